"""Inputs and work of gather_tokens: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (samples of x, B, N, M, C): visible tokens at 1B, a position table that all samples share at 1B
# (distillation decoder), teacher rows at S
SHAPES = [(4, 4, 2049, 417, 1408), (1, 4, 2049, 417, 1408), (4, 4, 2049, 417, 384)]
GPU_SHAPES = [(64, 64, 2049, 417, 1408), (1, 64, 2049, 417, 1408)]
WRT = ("x",)  # the gradient of add is dy itself


def inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The arguments of the op, by name."""
    samples, batch, tokens, keep, width = shape
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(batch, tokens, generator=g).argsort(1)[:, :keep].sort(1).values
    add = torch.randn(batch, keep, width, generator=g).to(dtype) if samples == 1 else None
    return {
        "x": torch.randn(samples, tokens, width, generator=g).to(dtype),
        "ids": ids.int(),
        "add": add,
    }


def work(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    samples, batch, _, keep, width = shape
    elements = batch * keep * width
    return (
        (elements, 3 * elements * dtype.itemsize)
        if samples == 1
        else (
            0,
            2 * elements * dtype.itemsize,
        )
    )


def backward_work(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Reads dy, writes all of dx."""
    samples, batch, tokens, keep, width = shape
    read, written = batch * keep * width, samples * tokens * width
    return read, (read + written) * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 3.0}
