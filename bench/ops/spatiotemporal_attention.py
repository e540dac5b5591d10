"""Inputs and work of spatiotemporal_attention: what is timed is what is tested."""

from __future__ import annotations

from typing import Any

import torch

from iv2kernels.ops.attention_blocks import BlockMask, per_frame, spacetime_window
from iv2kernels.ops.rope3d import Rope3d

# (B, N, heads, head_dim): stage-1 students S and 1B, all tokens of a clip, and these with the
# other patterns of video transformers or with rotary embedding
SHAPES: list[Any] = [
    *[(4, 417, 6, 64), (2, 417, 16, 88), (1, 2049, 6, 64), (1, 2049, 16, 88)],
    *[(1, 2049, 6, 64, pattern) for pattern in ("frame", "window", "rope")],
]
GPU_SHAPES: list[Any] = [(16, 417, 16, 88), (4, 2049, 16, 88), (4, 2049, 16, 88, "window")]
GRID = (8, 16, 16)
WRT = ("qkv", "q_weight", "k_weight")


def _blocks(shape: tuple[Any, ...]) -> BlockMask | None:
    if shape[4:] == ("frame",):
        return per_frame(GRID, cls_token=True)
    if shape[4:] == ("window",):
        return spacetime_window(GRID, 3, 5, cls_token=True)
    return None


def inputs(shape: tuple[Any, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the op, by name."""
    batch, tokens, heads, head_dim = shape[:4]
    width = heads * head_dim
    g = torch.Generator().manual_seed(0)
    found = {
        "qkv": torch.randn(batch, tokens, 3, heads, head_dim, generator=g).to(dtype),
        "q_weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
        "k_weight": (1 + 0.1 * torch.randn(width, generator=g)).to(dtype),
    }
    if shape[4:] == ("rope",):
        return {**found, "rope": Rope3d(GRID, cls_token=True)}
    return {**found, "blocks": _blocks(shape)} if shape[4:] else found


def work(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass; flops of pairs that are seen."""
    batch, tokens, heads, head_dim = shape[:4]
    blocks = _blocks(shape)
    pairs = tokens**2 if blocks is None else blocks.pairs
    return (
        4 * batch * heads * head_dim * pairs,
        4 * batch * tokens * heads * head_dim * dtype.itemsize,
    )


def backward_work(shape: tuple[Any, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Five products; reads qkv, o and its gradient, writes the gradient of qkv."""
    flops, size = work(shape, dtype)
    return 5 * flops // 2, 2 * size


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager_both": 2.5, "x_compile_both": 2.0}
