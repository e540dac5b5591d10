"""Inputs and work of rope3d: what is timed is what is tested."""

from __future__ import annotations

from typing import Any

import torch

import iv2kernels

# (B, T, H, W, visible, heads, head_dim): queries of the stage-1 students S and 1B, and of a clip
SHAPES = [(4, 8, 16, 16, 416, 6, 64), (2, 8, 16, 16, 416, 16, 88), (1, 8, 16, 16, 2048, 16, 88)]
GPU_SHAPES = [(32, 8, 16, 16, 416, 16, 88)]
WRT = ("x",)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of the op, by name: a view of a packed qkv, with a CLS token."""
    batch, frames, height, width, visible, heads, head_dim = shape
    g = torch.Generator().manual_seed(0)
    tokens = frames * height * width
    ids = torch.rand(batch, tokens, generator=g).argsort(1)[:, :visible].sort(1).values.int()
    qkv = torch.randn(batch, 1 + visible, 3, heads, head_dim, generator=g).to(dtype)
    rope = iv2kernels.Rope3d(
        (frames, height, width), None if visible == tokens else ids, cls_token=True
    )
    return {"x": qkv[:, :, 0], "rope": rope}


def work(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass."""
    batch, _, _, _, visible, heads, head_dim = shape
    elements = batch * (1 + visible) * heads * head_dim
    return 3 * elements, 2 * elements * dtype.itemsize


backward_work = work  # it rotates back
