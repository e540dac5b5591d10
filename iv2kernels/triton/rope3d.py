"""rope3d in Triton: tiles of heads, rotated in float32; backward rotates back.

A row of a tile is one head of one token, and its columns are the pairs of channels: the first half
of the head and the second are loaded side by side, so that head_dim 88 is read in pieces of 88
bytes, 8 at a time, and 64 or 128 by 16. Cosines and sines come from a table with a row for each
place of the grid; the heads of a token follow one another, and read its row from the L1 cache. No
axis is serial; memory bounds it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.ops.rope3d import axis_angles, axis_pairs
from iv2kernels.triton.common import row_tile


@lru_cache(maxsize=16)
def _tables(
    grid: tuple[int, ...], head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1 + T * H * W, pairs]; the first row is of a token that is not rotated."""
    axes = []
    for axis, (size, pairs) in enumerate(zip(grid, axis_pairs(head_dim), strict=True)):
        shape = [size if i == axis else 1 for i in range(3)]
        axes.append(axis_angles(size, pairs, theta).view(*shape, pairs).expand(*grid, pairs))
    angles = torch.cat(axes, -1).flatten(0, 2)
    angles = torch.cat([torch.zeros_like(angles[:1]), angles])
    return angles.cos().float().to(device), angles.sin().float().to(device)


@triton.jit(do_not_specialize=["rows", "N"])
def _rope3d_kernel(
    x,
    ids,
    cosines,
    sines,
    y,
    rows,
    N,
    x_stride_b,
    X_STRIDE_N: tl.constexpr,
    X_STRIDE_H: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # FIRST tokens, 0 or 1, are not rotated; HALF is the number of pairs
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (pair < HALF)[None, :]
    head, token = row % HEADS, row // HEADS
    sample, n = token // N, token % N
    place = n - FIRST
    if ids is not None:
        at = sample * (N - FIRST) + place
        place = tl.load(ids + at, mask=(row < rows) & (place >= 0), other=-1).to(tl.int32)
    angle = (place + 1).to(tl.int64)[:, None] * HALF + pair[None, :]
    cos = tl.load(cosines + angle, mask=mask, other=0.0)
    sin = tl.load(sines + angle, mask=mask, other=0.0) * SIGN
    source = sample.to(tl.int64) * x_stride_b + n.to(tl.int64) * X_STRIDE_N + head * X_STRIDE_H
    source = source[:, None] + pair[None, :]
    a = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + source + HALF, mask=mask, other=0.0).to(tl.float32)
    to = row.to(tl.int64)[:, None] * (2 * HALF) + pair[None, :]
    tl.store(y + to, (a * cos - b * sin).to(y.dtype.element_ty), mask=mask)
    tl.store(y + to + HALF, (b * cos + a * sin).to(y.dtype.element_ty), mask=mask)


def rope3d_fwd(
    x: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float
) -> Tensor:
    """See iv2kernels/ops/rope3d.py."""
    return _rotated(x, ids, grid, cls_token, theta, 1)


def rope3d_bwd(
    dy: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float
) -> Tensor:
    """The gradient of x."""
    return _rotated(dy, ids, grid, cls_token, theta, -1)


def _rotated(
    x: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float, sign: int
) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    _, tokens, heads, head_dim = x.shape
    rows, half = y.numel() // head_dim, head_dim // 2
    tile_rows, columns, warps = row_tile(half, 2048)
    _rope3d_kernel[(triton.cdiv(rows, tile_rows),)](
        x,
        None if ids is None else ids.contiguous(),
        *_tables(tuple(grid), head_dim, theta, x.device),
        y,
        rows,
        tokens,
        x.stride(0),
        X_STRIDE_N=x.stride(1),
        X_STRIDE_H=x.stride(2),
        FIRST=int(cls_token),
        HEADS=heads,
        HALF=half,
        SIGN=sign,
        ROWS=tile_rows,
        COLS=columns,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y
