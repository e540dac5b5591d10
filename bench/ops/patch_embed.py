"""Inputs and work of patch_embed: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, T, side, patch, C, visible patches or None for all): stage-1 students S and 1B, a teacher
SHAPES = [
    (4, 8, 224, 14, 384, 416),
    (4, 8, 224, 14, 1408, 416),
    (1, 8, 224, 14, 1408, None),
]
WRT = ("weight", "bias", "pos_embed", "cls_token")


def inputs(
    shape: tuple[int, int, int, int, int, int | None], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """The arguments of the op, by name."""
    batch, frames, side, patch, width, keep = shape
    tokens = frames * (side // patch) ** 2
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(batch, tokens, generator=g).argsort(1)[:, :keep].sort(1).values
    return {
        "video": torch.randn(batch, 3, frames, side, side, generator=g).to(dtype),
        "weight": (0.03 * torch.randn(width, 3, 1, patch, patch, generator=g)).to(dtype),
        "bias": (0.1 * torch.randn(width, generator=g)).to(dtype),
        "pos_embed": torch.randn(1 + tokens, width, generator=g).to(dtype),
        "cls_token": torch.randn(width, generator=g).to(dtype),
        "ids_keep": None if keep is None else ids.int(),
    }


def work(shape: tuple[int, int, int, int, int, int | None], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass, for the visible tokens."""
    batch, frames, side, patch, width, keep = shape
    rows = batch * (keep or frames * (side // patch) ** 2)
    depth = 3 * patch * patch
    elements = rows * (depth + 2 * width) + width * depth
    return 2 * rows * depth * width, elements * dtype.itemsize
