"""add_rms_norm in Triton: tiles of whole rows, so that each tensor is read and written once.

Forward: one program for a tile of about 4096 elements (two rows of 1408), four warps, 32 elements
a thread; weight and layer_scale are read once for the tile. No axis is serial.
Backward: one program walks over a chunk of rows (``common.row_chunks``), the serial axis, and keeps
its sums for dweight and dlayer_scale in registers; ``common.sum_partials`` adds them up. Loads are
asynchronous copies, a few tiles ahead.
Both are bound by memory: 4 tensors forward, 6 backward with every gradient; the partial sums, 8
bytes per chunk and column, stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.triton.common import row_chunks, row_tile, sum_partials


@triton.jit(do_not_specialize=["rows", "rows_per_sample"])
def _add_rms_norm_fwd_kernel(
    x,
    residual,
    weight,
    layer_scale,
    drop_scale,
    y,
    r,
    rstd,
    rows,
    rows_per_sample,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row.to(tl.int64)[:, None] * C + col[None, :]
    mask = (row < rows)[:, None] & (col < C)[None, :]
    total = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if drop_scale is not None:
        keep = tl.load(drop_scale + row // rows_per_sample, mask=row < rows, other=0.0)
        total *= keep.to(tl.float32)[:, None]
    if layer_scale is not None:
        scale = tl.load(layer_scale + col, mask=col < C, other=0.0).to(tl.float32)
        total *= scale[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    stored = total.to(r.dtype.element_ty)
    tl.store(r + at, stored, mask=mask)
    total = stored.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(total * total, 1) / C + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    gain = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    normed = total * inverse[:, None] * gain[None, :]
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "chunk"])
def _add_rms_norm_bwd_kernel(
    dy,
    dr,
    x,
    r,
    rstd,
    weight,
    layer_scale,
    drop_scale,
    dx,
    dresidual,
    partials,
    rows,
    rows_per_sample,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    col = tl.arange(0, COLS)
    first = tl.program_id(0) * chunk
    gain = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    if layer_scale is not None:
        scale = tl.load(layer_scale + col, mask=col < C, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dscale = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(0, chunk, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * C + col[None, :]
        mask = (row < rows)[:, None] & (col < C)[None, :]
        grad = tl.zeros([ROWS, COLS], tl.float32)
        if dy is not None:
            inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
            normed = tl.load(r + at, mask=mask, other=0.0).to(tl.float32) * inverse
            upper = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            dweight += upper * normed
            upper *= gain[None, :]
            mean = tl.sum(upper * normed, 1) / C
            grad = (upper - normed * mean[:, None]) * inverse
        if dr is not None:
            grad += tl.load(dr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual + at, grad.to(dresidual.dtype.element_ty), mask=mask)
        if drop_scale is not None:
            keep = tl.load(drop_scale + row // rows_per_sample, mask=row < rows, other=0.0)
            grad *= keep.to(tl.float32)[:, None]
        if x is not None:
            dscale += grad * tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if layer_scale is not None:
            grad *= scale[None, :]
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=mask)
    partials += tl.program_id(0).to(tl.int64) * C + col
    tl.store(partials, tl.sum(dweight, 0), mask=col < C)
    if x is not None:
        partials += tl.num_programs(0).to(tl.int64) * C
        tl.store(partials, tl.sum(dscale, 0), mask=col < C)


def _rows_per_sample(shape: torch.Size, rows: int) -> int:
    return rows // shape[0] if len(shape) > 1 else rows


def add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See iv2kernels/ops/add_rms_norm.py; the third is 1 / the root mean square of each row."""
    x, residual, weight = x.contiguous(), contiguous(residual), weight.contiguous()
    y, r = torch.empty_like(x), torch.empty_like(x if residual is None else residual)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, r, rstd
    dim = x.shape[-1]
    rows = x.numel() // dim
    tile_rows, columns, warps = row_tile(dim, 4096)
    _add_rms_norm_fwd_kernel[(triton.cdiv(rows, tile_rows),)](
        x,
        residual,
        weight,
        contiguous(layer_scale),
        contiguous(drop_scale),
        y,
        r,
        rstd,
        rows,
        _rows_per_sample(x.shape, rows),
        eps,
        C=dim,
        ROWS=tile_rows,
        COLS=columns,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y, r, rstd


def add_rms_norm_bwd(
    dy: Tensor | None,
    dr: Tensor | None,
    x: Tensor | None,
    r: Tensor,
    rstd: Tensor,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight and (zero without x) layer_scale."""
    rows, dim = rstd.numel(), r.shape[-1]
    dx, dresidual = torch.empty_like(r, dtype=x_dtype), torch.empty_like(r)
    if rows == 0 or dim == 0:
        dweight = torch.zeros(dim, dtype=torch.float32, device=r.device)
        return dx, dresidual, dweight, torch.zeros_like(dweight)
    tile_rows, columns, warps = row_tile(dim, 2048)
    chunk, chunks = row_chunks(rows, tile_rows)
    kinds = 1 if x is None else 2
    partials = torch.empty(kinds, chunks, dim, dtype=torch.float32, device=r.device)
    _add_rms_norm_bwd_kernel[(chunks,)](
        contiguous(dy),
        contiguous(dr),
        contiguous(x),
        r,
        rstd,
        weight.contiguous(),
        contiguous(layer_scale),
        contiguous(drop_scale),
        dx,
        dresidual,
        partials,
        rows,
        _rows_per_sample(r.shape, rows),
        chunk,
        C=dim,
        ROWS=tile_rows,
        COLS=columns,
        STAGES=2,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    sums = sum_partials(partials)
    return dx, dresidual, sums[0], torch.zeros_like(sums[0]) if x is None else sums[1]
