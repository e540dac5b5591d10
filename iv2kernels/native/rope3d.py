"""rope3d on csrc/cpu/rope3d.cpp."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.attention import threads_for
from iv2kernels.native.gather_tokens import checked_ids
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.ops.rope3d import axis_angles, axis_pairs


@lru_cache(maxsize=64)
def _tables(grid: tuple[int, ...], head_dim: int, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, sines and negated sines by axis, position and pair, one axis after the other."""
    axes = zip(grid, axis_pairs(head_dim), strict=True)
    angles = torch.cat([axis_angles(size, pairs, theta).flatten() for size, pairs in axes])
    sin = angles.sin().float()
    return angles.cos().float(), sin, -sin


def rope3d_fwd(
    x: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float
) -> Tensor:
    """See csrc/kernels.h: Rope3dFwd."""
    if ids is not None:
        ids = checked_ids("rope3d", "ids", ids, math.prod(grid))
    return _rotated(x, ids, grid, cls_token, _tables(tuple(grid), x.shape[-1], theta)[:2])


def rope3d_bwd(
    dy: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float
) -> Tensor:
    """See csrc/kernels.h: Rope3dFwd; the angles are negated."""
    if ids is not None:
        ids = ids.int().contiguous()
    return _rotated(dy, ids, grid, cls_token, _tables(tuple(grid), dy.shape[-1], theta)[::2])


def _rotated(
    x: Tensor,
    ids: Tensor | None,
    grid: list[int],
    cls_token: bool,
    tables: tuple[Tensor, ...],
) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel():
        cos, sin = tables
        _C.rope3d_fwd(
            ptr(x),
            ptr(y),
            ptr(ids),
            ptr(cos),
            ptr(sin),
            *x.shape[:2],
            int(cls_token),
            *x.shape[2:],
            *grid,
            *axis_pairs(x.shape[-1]),
            *x.stride()[:3],
            DTYPE[x.dtype],
            threads_for(8 * x.numel()),
        )
    return y
