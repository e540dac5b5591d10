"""distill_loss in Triton: whole rows in registers, the gradient with the loss.

One program walks over a chunk of rows (common.row_chunks), the serial axis, a tile of them at a
time: mean, variance, the three sums that give the cosine, and the gradient back through the cosine
and the norm. Since the loss is a sum over rows, dx, dweight and dbias are known before any gradient
arrives, up to its factor; they are stored times a power of two near rows * dim, which keeps a
float16 dx in range, and backward scales them. Sums for dweight and dbias stay in registers and are
added up in order (common.sum_partials). Without them a chunk is one tile.
Bound by memory: one read of x and of the target's rows, wherever ids say, one write of dx; backward
one read and one write of dx. Indices are not checked: reading them back would wait for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.triton.common import row_chunks, row_tile, sum_partials

# torch.nn.functional.cosine_similarity's least norm.
_LEAST_NORM = tl.constexpr(1e-8)
# Elements that a program of backward scales.
_SCALED = 4096


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "target_rows", "chunk"])
def _distill_loss_fwd_kernel(
    x,
    target,
    ids,
    weight,
    bias,
    losses,
    dx,
    partials,
    rows,
    rows_per_sample,
    target_rows,
    chunk,
    eps,
    factor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # factor: of the gradients, -2 unit / rows
    col = tl.arange(0, COLS)
    w = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    first = tl.program_id(0) * chunk
    for start in tl.range(0, chunk, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < D)[None, :]
        source = row % rows_per_sample
        known = mask
        if ids is not None:
            source = tl.load(ids + row, mask=row < rows, other=0)
            known = mask & ((source >= 0) & (source < target_rows))[:, None]
        source = source.to(tl.int64) + (row // rows_per_sample).to(tl.int64) * target_rows
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        t = tl.load(target + source[:, None] * D + col[None, :], mask=known, other=0.0)
        t = t.to(tl.float32)
        if ids is not None:  # a row that there is none of
            t = tl.where(mask & ~known, float("nan"), t)
        h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        h = tl.where(mask, h - tl.sum(h, 1)[:, None] / D, 0.0)
        rstd = tl.rsqrt(tl.sum(h * h, 1) / D + eps)
        h *= rstd[:, None]
        # 0 past the end, as w and b are
        y = h * w + b
        length = tl.sqrt_rn(tl.sum(y * y, 1))
        least = tl.maximum(length, _LEAST_NORM)
        target_length = tl.maximum(tl.sqrt_rn(tl.sum(t * t, 1)), _LEAST_NORM)
        cosine = tl.div_rn(tl.sum(y * t, 1), least * target_length)
        tl.store(losses + row, 2.0 - 2.0 * cosine, mask=row < rows)
        if dx is not None or partials is not None:
            by_t = factor / (least * target_length)
            # the clamp of the length is not differentiated, the length is, as torch does
            by_y = tl.where(length > 0, factor * cosine / (least * length), 0.0)
            dy = tl.where(mask, by_t[:, None] * t - by_y[:, None] * y, 0.0)
            dweight += dy * h
            dbias += dy
            if dx is not None:
                dy *= w
                dh = dy - tl.sum(dy, 1)[:, None] / D - h * (tl.sum(dy * h, 1)[:, None] / D)
                tl.store(dx + at, (dh * rstd[:, None]).to(dx.dtype.element_ty), mask=mask)
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * D + col
        tl.store(partials, tl.sum(dweight, 0), mask=col < D)
        partials += tl.num_programs(0).to(tl.int64) * D
        tl.store(partials, tl.sum(dbias, 0), mask=col < D)


@triton.jit
def _distill_loss_bwd_kernel(unit, scale, dx, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(unit + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(scale)
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=at < count)


def _unit(rows: int, dim: int) -> float:
    # a power of two: scaling by it rounds nothing
    return 2.0 ** (rows * dim).bit_length()


def distill_loss_fwd(
    x: Tensor,
    target: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ids: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See iv2kernels/ops/distill_loss.py; gradients, empty where not needed, lack their factor."""
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    x, target = x.contiguous(), target.contiguous()
    dx = x.new_empty(x.shape if needs[0] else 0)
    if rows == 0 or dim == 0:
        dweight = torch.zeros(dim if needs[1] else 0, dtype=torch.float32, device=x.device)
        loss = torch.full((), torch.nan, device=x.device)
        return loss, dx, dweight, torch.zeros_like(dweight)
    tile_rows, columns, warps = row_tile(dim, 2048)
    chunk, chunks = row_chunks(rows, tile_rows)
    if not needs[1]:
        chunk, chunks = tile_rows, triton.cdiv(rows, tile_rows)
    losses = torch.empty(rows, dtype=torch.float32, device=x.device)
    partials = losses.new_empty(2, chunks, dim) if needs[1] else None
    _distill_loss_fwd_kernel[(chunks,)](
        x,
        target,
        contiguous(ids),
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        losses,
        dx if needs[0] else None,
        partials,
        rows,
        x.shape[1],
        target.shape[1],
        chunk,
        eps,
        -2.0 * _unit(rows, dim) / rows,
        D=dim,
        ROWS=tile_rows,
        COLS=columns,
        STAGES=2,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    loss = losses.mean(dtype=torch.float64).float()
    if partials is None:
        return loss, dx, losses.new_empty(0), losses.new_empty(0)
    dweight, dbias = sum_partials(partials)
    return loss, dx, dweight, dbias


def distill_loss_bwd(
    dloss: Tensor, dx_unit: Tensor, dweight_unit: Tensor, dbias_unit: Tensor, rows: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, norm_weight and norm_bias."""
    scale = dloss / _unit(rows, dim)
    dx = torch.empty_like(dx_unit)
    if dx.numel() > 0:
        _distill_loss_bwd_kernel[(triton.cdiv(dx.numel(), _SCALED),)](
            dx_unit,
            scale,
            dx,
            dx.numel(),
            BLOCK=_SCALED,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return dx, dweight_unit * scale, dbias_unit * scale
