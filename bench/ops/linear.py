"""Inputs and work of linear: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (rows, C_in, C_out): qkv of S and 1B, proj of S, the decoder of the 6B teacher
SHAPES = [(4 * 417, 384, 1152), (4 * 417, 384, 384), (4 * 417, 1408, 4224), (4 * 417, 384, 3200)]
GPU_SHAPES = [(64 * 417, 384, 1152), (64 * 417, 1408, 4224)]
WRT = ("x", "weight", "bias")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    rows, c_in, c_out = shape
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(rows, c_in, generator=g).to(dtype),
        "weight": (torch.randn(c_out, c_in, generator=g) * c_in**-0.5).to(dtype),
        "bias": (0.1 * torch.randn(c_out, generator=g)).to(dtype),
    }


def work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    rows, c_in, c_out = shape
    elements = rows * c_in + rows * c_out + c_in * c_out
    return 2 * rows * c_in * c_out, elements * dtype.itemsize


def backward_work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Two products; reads dy, x and the weight, writes two gradients."""
    rows, c_in, c_out = shape
    elements = 2 * rows * c_in + rows * c_out + 2 * c_in * c_out
    return 4 * rows * c_in * c_out, elements * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager": 2.0 if dtype == "float32" else 1.0}
