"""Inputs and work of attention_pool: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, N, C, heads): stage-1 students S, 1B and 6B, and an unmasked 1B
SHAPES = [(4, 417, 384, 16), (4, 417, 1408, 16), (2, 417, 3200, 16), (1, 2049, 1408, 16)]
WRT = ("x", "query")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    batch, tokens, width, heads = shape
    g = torch.Generator().manual_seed(0)
    x = 0.5 + 2 * torch.randn(batch, tokens, width, generator=g)
    return {
        "x": x.to(dtype),
        "query": (torch.randn(batch, heads, width, generator=g) * width**-0.5).to(dtype),
    }


def work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    batch, tokens, width, heads = shape
    elements = batch * tokens * width + 2 * batch * heads * width
    return 4 * batch * tokens * width * heads, elements * dtype.itemsize
