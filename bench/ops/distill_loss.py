"""Inputs and work of distill_loss: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, M, N, D): stage-1 CLIP and MAE branch; N is the teacher's number of tokens
SHAPES = [(4, 417, 417, 3200), (4, 416, 416, 1408), (2, 417, 2049, 3200)]
GPU_SHAPES = [(16, 417, 417, 3200), (64, 416, 416, 1408)]
WRT = ("x", "norm_weight", "norm_bias")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    batch, rows, tokens, width = shape
    g = torch.Generator().manual_seed(0)
    target = torch.randn(batch, tokens, width, generator=g)
    ids = torch.rand(batch, tokens, generator=g).argsort(1)[:, :rows].sort(1).values.int()
    if rows > tokens:
        ids = torch.randint(tokens, (batch, rows), generator=g)
    # as correlated as in training
    near = target.gather(1, ids.long()[..., None].expand(-1, -1, width))
    x = near + torch.randn(near.shape, generator=g)
    return {
        "x": x.to(dtype),
        "target": target.to(dtype),
        "norm_weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
        "norm_bias": (0.1 * torch.randn(width, generator=g)).to(dtype),
        "ids": ids,
    }


def work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass, which also finds dx."""
    elements = shape[0] * shape[1] * shape[3]
    return 30 * elements, 3 * elements * dtype.itemsize


def backward_work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Forward has found dx: it is scaled."""
    elements = shape[0] * shape[1] * shape[3]
    return elements, 2 * elements * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 15.0, "x_compile_both": 6.0}
