"""siglip_loss in Triton: the pairwise sigmoid loss over tiles of s = scale v t^T + bias.

With y = -s for a pair of equal labels and s for any other, the loss is the sum of softplus(y):
pairs do not know of each other, so a program for each tile stores one sum (pair_tiles.py). Most
pairs are negatives far from the threshold, whose softplus is about e^y: the logarithm is a series
that is accurate for small arguments. Backward: dloss/ds = +-sigmoid(y). No axis is serial but D;
bound by the tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.triton.pair_tiles import (
    PairGradients,
    labels_and_counts,
    pair_products,
    same_labels,
    store_gradients,
    tile_of,
)


@triton.jit
def _log_1_plus(u):
    # of u in [0, 1]: 2 atanh(w) with w = u / (2 + u), at most 1/3
    w = u / (u + 2.0)
    ww = w * w
    p = ww * (2.0 / 17) + 2.0 / 15
    p = p * ww + 2.0 / 13
    p = p * ww + 2.0 / 11
    p = p * ww + 2.0 / 9
    p = p * ww + 2.0 / 7
    p = p * ww + 2.0 / 5
    p = p * ww + 2.0 / 3
    return p * ww * w + (w + w)


@triton.jit(do_not_specialize=["rows", "columns"])
def _siglip_loss_fwd_kernel(
    v,
    t,
    labels,
    scale,
    bias,
    sums,
    rows,
    columns,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = pair_products(v, t, row, col, rows, columns, D, BLOCK_M, BLOCK_N, BLOCK_K)
    s = g * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    y = tl.where(same_labels(labels, labels, row, col, rows, columns), -s, s)
    # the comparison keeps NaN, as a maximum would not
    softplus = tl.where(y < 0, 0.0, y) + _log_1_plus(tl.exp(-tl.abs(y)))
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    total = tl.sum(tl.sum(tl.where(inside, softplus, 0.0), 1), 0)
    tl.store(sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["rows", "columns"])
def _siglip_loss_bwd_kernel(
    v,
    t,
    labels,
    column_labels,
    scale,
    bias,
    dg,
    sums,
    rows,
    columns,
    part_stride,
    row_stride,
    D: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = pair_products(v, t, row, col, rows, columns, D, BLOCK_M, BLOCK_N, BLOCK_K)
    s = g * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    same = same_labels(labels, column_labels, row, col, rows, columns)
    y = tl.where(same, -s, s)
    u = tl.exp(-tl.abs(y))
    sigmoid = tl.where(y < 0, u, 1.0) / (u + 1.0)
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    ds = tl.where(inside, tl.where(same, -sigmoid, sigmoid), 0.0)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + 2 * at, tl.sum(tl.sum(ds * g, 1), 0))
    tl.store(sums + 2 * at + 1, tl.sum(tl.sum(ds, 1), 0))
    if dg is not None:
        store_gradients(dg, ds, row, col, part_stride, row_stride, RAISE)


def siglip_loss_fwd(
    v: Tensor, t: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/siglip_loss.py. The second result is the rows' labels."""
    rows, dim = v.shape
    labels, _ = labels_and_counts(ids, rows, v.device)
    if rows == 0:
        return torch.full((), torch.nan, device=v.device), labels
    tile = tile_of(v.dtype)
    grid = tile.blocks(rows, rows)[::-1]
    sums = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=v.device)
    _siglip_loss_fwd_kernel[grid](
        v.contiguous(),
        t.contiguous(),
        labels,
        scale.to(v.device),
        bias.to(v.device),
        sums,
        rows,
        rows,
        D=dim,
        **tile.options(),
    )
    return sums.sum(dtype=torch.float64).div(rows).float(), labels


def siglip_loss_bwd(
    dloss: Tensor,
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of v, t, scale and bias; of v and t empty where not needed."""
    rows, dim = v.shape
    if rows == 0:
        dv, dt = (v.new_zeros(v.shape if need else 0) for need in needs)
        return dv, dt, torch.zeros_like(scale), torch.zeros_like(bias)
    to_s = dloss.double() / rows
    grads = PairGradients(
        v.contiguous(), t.contiguous(), to_s * scale.double().to(v.device), needs, v.dtype
    )
    tile, sums = grads.tile, []
    for strip in grads.strips:
        own = grads.v[strip]
        grid = tile.blocks(len(own), rows)[::-1]
        sums.append(torch.empty(grid[0] * grid[1], 2, dtype=torch.float32, device=v.device))
        _siglip_loss_bwd_kernel[grid](
            own,
            grads.t,
            labels[strip],
            labels,
            scale.to(v.device),
            bias.to(v.device),
            grads.dg,
            sums[-1],
            len(own),
            rows,
            *grads.strides,
            D=dim,
            RAISE=grads.raised,
            **tile.options(),
        )
        grads.add(strip)
    total = torch.cat(sums).sum(0, dtype=torch.float64) * to_s
    dscale, dbias = (d.to(x, copy=True) for d, x in zip(total, (scale, bias), strict=True))
    return grads.dv, grads.dt, dscale, dbias
