"""Inputs and work of add_rms_norm: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, N, C): stage-1 students S and 1B, stage-2 1B
SHAPES = [(4, 417, 384), (4, 417, 1408), (2, 1025, 1408)]
GPU_SHAPES = [(64, 417, 384), (64, 417, 1408), (16, 2049, 1408)]
WRT = ("x", "residual", "weight", "layer_scale")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    batch, _, width = shape
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(shape, generator=g).to(dtype),
        "residual": torch.randn(shape, generator=g).to(dtype),
        "weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
        "layer_scale": (0.1 * torch.randn(width, generator=g)).to(dtype),
        "drop_scale": torch.bernoulli(torch.full((batch,), 0.8), generator=g).div(0.8),
    }


def work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    elements = shape[0] * shape[1] * shape[2]
    return 6 * elements, 4 * elements * dtype.itemsize


def backward_work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Reads dy, dr, r and x, writes dx and the residual's gradient."""
    elements = shape[0] * shape[1] * shape[2]
    return 12 * elements, 6 * elements * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 5.0, "x_compile_both": 1.1}
