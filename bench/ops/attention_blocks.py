"""Inputs and work of block-sparse attention: dense attention of the same tokens is the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import iv2kernels

OP = STEM = "attention"
# (frames, rows or None, heads, head_dim): windows over a clip of 8 x 16 x 16 tokens with a CLS;
# density 1, .66, .34, .13
SHAPES = [(8, None, 6, 64), (3, None, 6, 64), (1, None, 6, 64), (0, None, 6, 64)]
GPU_SHAPES = [(8, None, 16, 88), (3, None, 16, 88), (0, None, 16, 88)]
WRT = ("q", "k", "v")
_GRID = (8, 16, 16)


def _blocks(shape: tuple[int, int | None, int, int]) -> iv2kernels.BlockMask:
    return iv2kernels.spacetime_window(_GRID, shape[0], shape[1], cls_token=True)


def inputs(shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the op, by name."""
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 2049, 3, *shape[2:], generator=g).to(dtype)
    q, k, v = qkv.unbind(2)
    return {"q": q, "k": k, "v": v, "blocks": _blocks(shape)}


def work(shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass, of the pairs that are seen."""
    _, _, heads, head_dim = shape
    return 4 * _blocks(shape).pairs * heads * head_dim, 4 * 2049 * heads * head_dim * dtype.itemsize


def backward_work(shape: tuple[int, int | None, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Five products; reads q, k, v, o and its gradient, writes three."""
    _, _, heads, head_dim = shape
    pairs = _blocks(shape).pairs
    return 10 * pairs * heads * head_dim, 8 * 2049 * heads * head_dim * dtype.itemsize


def library(shape: tuple[int, int | None, int, int]) -> Callable[..., Tensor]:
    """Our own dense attention, whatever the blocks."""

    def call(q: Tensor, k: Tensor, v: Tensor, blocks: Any) -> Tensor:
        return iv2kernels.attention(q, k, v)  # type: ignore[return-value]

    return call


def goals(shape: tuple[int, int | None, int, int], dtype: str) -> dict[str, float]:
    """The least values of columns of the table: time goes with density, within 15 %."""
    return {"x_library": 1 / (1.15 * _blocks(shape).density)}
