"""Inputs and work of attention_pool: what is timed is what is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (B, N, C, heads): stage-1 students S, 1B and 6B, and an unmasked 1B
SHAPES = [(4, 417, 384, 16), (4, 417, 1408, 16), (2, 417, 3200, 16), (1, 2049, 1408, 16)]
GPU_SHAPES = [(64, 417, 1408, 16)]
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


def backward_work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Scores again, their gradient, and what both give x; reads x, writes its gradient."""
    batch, tokens, width, heads = shape
    elements = 2 * batch * tokens * width + 4 * batch * heads * width
    return 8 * batch * tokens * width * heads, elements * dtype.itemsize


def library(shape: tuple[int, int, int, int]) -> Callable[..., Tensor]:
    """The pooling block as published: keys and values of all tokens are projected."""
    _, _, width, heads = shape
    g = torch.Generator().manual_seed(1)
    key, value = (torch.randn(width, width, generator=g) * width**-0.5 for _ in range(2))

    def call(x: Tensor, query: Tensor) -> Tensor:
        normed = F.layer_norm(x, (width,))
        k, v = (
            F.linear(normed, w.to(x)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for w in (key, value)
        )
        q = query[..., : width // heads].unsqueeze(2)
        return F.scaled_dot_product_attention(q, k, v)

    return call


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_library_both": 20.0}
