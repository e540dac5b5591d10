"""gather_tokens in Triton: tiles of whole rows, each read and written once.

Forward: one program for a tile of rows of y; the rows of x lie wherever ids say.
Backward: a scatter-add without atomics. The ids are sorted first, stably, so that the rows of dy
that meet in a row of dx follow one another; then one program for a tile of rows of dx adds them up
in float32 in this order, the serial axis, and the same bits come out every time.
Both are bound by memory. Indices are not checked: reading them back would wait for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.triton.common import row_tile


@triton.jit(do_not_specialize=["rows", "N", "M"])
def _gather_tokens_fwd_kernel(
    x,
    ids,
    add,
    y,
    rows,
    N,
    M,
    x_stride_b,
    x_stride_n,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (col < C)[None, :]
    token = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    # what there is no token of is read as NaN
    known = mask & ((token >= 0) & (token < N))[:, None]
    place = token * x_stride_n + (row // M).to(tl.int64) * x_stride_b
    value = tl.load(x + place[:, None] + col[None, :], mask=known, other=float("nan"))
    at = row.to(tl.int64)[:, None] * C + col[None, :]
    if add is not None:
        value = value.to(tl.float32) + tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "N", "M"])
def _gather_tokens_bwd_kernel(
    dy,
    starts,
    order,
    dx,
    rows,
    N,
    M,
    dy_stride_b,
    dx_stride_b,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    start = tl.load(starts + row, mask=row < rows, other=0)
    count = tl.load(starts + row + 1, mask=row < rows, other=0) - start
    total = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(0, tl.max(count, 0)):
        source = tl.load(order + start + i, mask=i < count, other=0)
        place = (source // M).to(tl.int64) * dy_stride_b + (source % M) * C
        mask = (i < count)[:, None] & (col < C)[None, :]
        total += tl.load(dy + place[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = (row // N).to(tl.int64) * dx_stride_b + (row % N) * C
    mask = (row < rows)[:, None] & (col < C)[None, :]
    tl.store(dx + at[:, None] + col[None, :], total.to(dx.dtype.element_ty), mask=mask)


def gather_tokens_fwd(x: Tensor, ids: Tensor, add: Tensor | None) -> Tensor:
    """See iv2kernels/ops/gather_tokens.py."""
    dtype = x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)
    if x.stride(2) != 1:
        x = x.contiguous()
    y = torch.empty(*ids.shape, x.shape[2], dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, dim = ids.numel(), x.shape[2]
    tile_rows, columns, warps = row_tile(dim, 4096)
    _gather_tokens_fwd_kernel[(triton.cdiv(rows, tile_rows),)](
        x,
        ids.contiguous(),
        contiguous(add),
        y,
        rows,
        x.shape[1],
        ids.shape[1],
        0 if x.shape[0] == 1 else x.stride(0),
        x.stride(1),
        C=dim,
        ROWS=tile_rows,
        COLS=columns,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y


def gather_tokens_bwd(
    dy: Tensor, ids: Tensor, samples: int, tokens: int, x_dtype: torch.dtype
) -> Tensor:
    """The gradient of x."""
    dx = torch.empty(samples, tokens, dy.shape[2], dtype=x_dtype, device=dy.device)
    scatter_add(dy, ids, dx)
    return dx


def scatter_add(
    dy: Tensor,  # [B, M, C]
    ids: Tensor,  # [B, M]
    dx: Tensor,  # [B or 1, N, C], the rows of a sample contiguous; written whole
) -> None:
    """dx[b or 0, n] = the sum of dy[b, m] over ids[b, m] == n; other ids are dropped."""
    (batch, keep, dim), (samples, tokens, _) = dy.shape, dx.shape
    if dx.numel() == 0:
        return
    if dy.stride(2) != 1 or dy.stride(1) != dim:
        dy = dy.contiguous()
    rows = samples * tokens
    known, keys = (ids >= 0) & (ids < tokens), ids.to(torch.int32)
    if samples > 1:
        keys = keys + tokens * torch.arange(batch, dtype=torch.int32, device=ids.device)[:, None]
    keys = torch.where(known, keys, rows)  # behind all others
    ordered, order = torch.sort(keys.flatten(), stable=True)
    every = torch.arange(rows + 1, dtype=torch.int32, device=ids.device)
    starts = torch.searchsorted(ordered, every, out_int32=True)
    tile_rows, columns, warps = row_tile(dim, 2048)
    _gather_tokens_bwd_kernel[(triton.cdiv(rows, tile_rows),)](
        dy,
        starts,
        order,
        dx,
        rows,
        tokens,
        keep,
        dy.stride(0),
        dx.stride(0),
        C=dim,
        ROWS=tile_rows,
        COLS=columns,
        num_warps=warps,
        enable_fp_fusion=True,
    )
