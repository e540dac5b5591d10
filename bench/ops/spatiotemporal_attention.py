"""Inputs and work of spatiotemporal_attention: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, N, heads, head_dim): stage-1 students S and 1B, then all tokens of a clip
SHAPES = [(4, 417, 6, 64), (2, 417, 16, 88), (1, 2049, 6, 64), (1, 2049, 16, 88)]
WRT = ("qkv", "q_weight", "k_weight")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    batch, tokens, heads, head_dim = shape
    width = heads * head_dim
    g = torch.Generator().manual_seed(0)
    return {
        "qkv": torch.randn(batch, tokens, 3, heads, head_dim, generator=g).to(dtype),
        "q_weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
        "k_weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
    }


def work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    batch, tokens, heads, head_dim = shape
    elements = batch * tokens * heads * head_dim
    return 4 * elements * tokens, 4 * elements * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 2.5, "x_compile_both": 2.0}
