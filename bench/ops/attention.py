"""Inputs and work of attention: what is timed is what is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (B, N, heads, head_dim): stage-1 students S and 1B, then all tokens of a clip; strided qkv views
SHAPES = [(4, 417, 6, 64), (2, 417, 16, 88), (1, 2049, 6, 64), (1, 2049, 16, 88)]
# Batches that fill a GPU: stage-1 students 1B and S, all tokens of a clip at 1B and 6B
GPU_SHAPES = [(16, 417, 16, 88), (16, 417, 6, 64), (4, 2049, 16, 88), (4, 2049, 25, 128)]
WRT = ("q", "k", "v")


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name: views of one packed projection."""
    batch, tokens, heads, head_dim = shape
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=g).to(dtype)
    q, k, v = qkv.unbind(2)
    return {"q": q, "k": k, "v": v}


def work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    batch, tokens, heads, head_dim = shape
    elements = batch * tokens * heads * head_dim
    return 4 * elements * tokens, 4 * elements * dtype.itemsize


def backward_work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Five products; reads q, k, v, o and its gradient, writes three."""
    batch, tokens, heads, head_dim = shape
    elements = batch * tokens * heads * head_dim
    return 10 * elements * tokens, 8 * elements * dtype.itemsize


def library(shape: tuple[int, int, int, int]) -> Callable[..., Tensor]:
    """PyTorch's own, on the same strided views."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    return call


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    if dtype == "bfloat16":
        return {"x_library": 3.5, "x_library_both": 2.0, "peak_percent": 55}
    return {"x_library": 2.5 if shape[3] == 64 else 1.8}
