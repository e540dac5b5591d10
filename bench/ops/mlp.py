"""Inputs and work of mlp: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (rows, C, H): stage-1 students S and 1B
SHAPES = [(4 * 417, 384, 1536), (4 * 417, 1408, 6144)]
GPU_SHAPES = [(64 * 417, 384, 1536), (64 * 417, 1408, 6144)]
WRT = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    rows, width, hidden = shape
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(rows, width, generator=g).to(dtype),
        "fc1_weight": (torch.randn(hidden, width, generator=g) * width**-0.5).to(dtype),
        "fc1_bias": (0.1 * torch.randn(hidden, generator=g)).to(dtype),
        "fc2_weight": (torch.randn(width, hidden, generator=g) * hidden**-0.5).to(dtype),
        "fc2_bias": (0.1 * torch.randn(width, generator=g)).to(dtype),
    }


def work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    rows, width, hidden = shape
    elements = 2 * rows * width + 3 * rows * hidden + 2 * width * hidden
    return 4 * rows * width * hidden, elements * dtype.itemsize


def backward_work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Four products; reads dy, x, what GELU was given and the weights, writes three gradients."""
    rows, width, hidden = shape
    elements = 3 * rows * width + rows * hidden + 4 * width * hidden
    return 8 * rows * width * hidden, elements * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 2.0 if dtype == "float32" else 1.0}
