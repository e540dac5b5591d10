"""Inputs and work of patch_embed: what is timed is what is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (B, T, side, patch, C, visible patches or None for all): stage-1 students S and 1B, a teacher
SHAPES = [
    (4, 8, 224, 14, 384, 416),
    (4, 8, 224, 14, 1408, 416),
    (1, 8, 224, 14, 1408, None),
]
GPU_SHAPES = [(64, 8, 224, 14, 1408, 416)]
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


def backward_work(
    shape: tuple[int, int, int, int, int, int | None], dtype: torch.dtype
) -> tuple[int, int]:
    """The weight's gradient; pixels have none."""
    batch, frames, side, patch, width, keep = shape
    rows = batch * (keep or frames * (side // patch) ** 2)
    depth = 3 * patch * patch
    elements = rows * (depth + width) + width * depth
    return 2 * rows * depth * width, elements * dtype.itemsize


def library(shape: tuple[int, int, int, int, int, int | None]) -> Callable[..., Tensor]:
    """conv3d of all tubelets, then the visible ones."""

    def call(
        video: Tensor,
        weight: Tensor,
        bias: Tensor,
        pos_embed: Tensor,
        cls_token: Tensor,
        ids_keep: Tensor | None,
    ) -> Tensor:
        stride = weight.shape[2:]
        x = F.conv3d(video, weight, bias, stride=tuple(stride)).flatten(2).transpose(1, 2)
        x = x + pos_embed[1:]
        first = (cls_token + pos_embed[0]).expand(len(x), 1, -1)
        if ids_keep is not None:
            x = x.gather(1, ids_keep.long()[..., None].expand(-1, -1, x.shape[2]))
        return torch.cat([first, x], 1)

    return call


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {} if shape[5] is None else {"x_library_both": 4.0}
