"""contrastive_loss in Triton: symmetric InfoNCE over the logits s = v t^T / temperature.

Forward: a program for each tile of s (pair_tiles.py) finds the maximum and the sum of exponentials
of its rows and of its columns from one product; a second kernel joins those of rows after each
strip, and carries those of columns from strip to strip; a third sums up the loss. Terms equal to
the maximum are counted and not summed: where the only positive is the maximum, as it is late in
training, the loss is log(1 + rest) for a rest far below the precision of 1.
Backward: dloss/ds = (softmax_row + softmax_column - 2 target) dloss / 2B, from a second product;
the target, the same-label matrix over its row sums, is symmetric and compared on the fly.
A temperature that is not positive and finite gives NaN: looking at it would wait for the GPU.
Bound by the tensor cores; the serial axes are D and the strips.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.triton.pair_tiles import (
    STRIP,
    PairGradients,
    labels_and_counts,
    pair_products,
    same_labels,
    store_gradients,
    strips,
    tile_of,
)

# Rows or columns that a program joins, and parts of them at a time.
_JOINED = 32


@triton.jit
def _logits(g, temperature):
    # g / temperature, as a product with 1 / temperature in two parts
    value = tl.load(temperature).to(tl.float64)
    good = (value > 0) & (value < float("inf"))
    inverse = tl.where(good, 1.0 / value, float("nan"))
    high = inverse.to(tl.float32)
    low = (inverse - high.to(tl.float64)).to(tl.float32)
    return g * high + g * low


@triton.jit
def _store_terms(to, stride, at, mask, s, AXIS: tl.constexpr):
    # of the rows of a tile (AXIS 1) or its columns: the maximum, how often it occurs, and the sum
    # of the other e^(s - maximum)
    most = tl.max(s, AXIS)
    by = s - tl.expand_dims(most, AXIS)
    highest = s == tl.expand_dims(most, AXIS)
    tl.store(to + at, most, mask=mask)
    tl.store(to + stride + at, tl.sum(highest.to(tl.float32), AXIS), mask=mask)
    rest = tl.sum(tl.where(highest, 0.0, tl.exp(by)), AXIS)
    tl.store(to + 2 * stride + at, rest, mask=mask)


@triton.jit(do_not_specialize=["rows", "columns"])
def _contrastive_loss_fwd_kernel(
    v,
    t,
    labels,
    column_labels,
    temperature,
    row_parts,
    column_parts,
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
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    s = tl.where(inside, _logits(g, temperature), float("-inf"))
    to = row_parts + tl.program_id(0).to(tl.int64) * 4 * rows
    _store_terms(to, rows, row, row < rows, s, 1)
    same = same_labels(labels, column_labels, row, col, rows, columns)
    tl.store(to + 3 * rows + row, tl.sum(tl.where(same, s, 0.0), 1), mask=row < rows)
    # the first part is that of the strips before
    to = column_parts + (tl.program_id(1) + 1).to(tl.int64) * 3 * columns
    _store_terms(to, columns, col, col < columns, s, 0)


@triton.jit(do_not_specialize=["size", "first", "count"])
def _contrastive_loss_join_kernel(
    parts,
    out,
    size,
    out_stride,
    first,
    count,
    KINDS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    # parts [count, KINDS, size] of the same rows or columns, joined from `first` on in their order
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = col < size
    most = tl.full([COLS], float("-inf"), tl.float32)
    ties = tl.zeros([COLS], tl.float32)
    rest = tl.zeros([COLS], tl.float32)
    positives = tl.zeros([COLS], tl.float32)
    for start in range(first, count, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & inside[None, :]
        at = parts + part.to(tl.int64)[:, None] * KINDS * size + col[None, :]
        part_most = tl.load(at, mask=mask, other=float("-inf"))
        part_ties = tl.load(at + size, mask=mask, other=0.0)
        part_rest = tl.load(at + 2 * size, mask=mask, other=0.0)
        highest = tl.maximum(most, tl.max(part_most, 0))
        # sums against the maximum so far, and those of the parts
        shrunk = (ties + rest) * tl.exp(most - highest)
        rest = tl.where(most == highest, rest, shrunk)
        ties = tl.where(most == highest, ties, 0.0)
        tied = part_most == highest[None, :]
        shrunk = (part_ties + part_rest) * tl.exp(part_most - highest[None, :])
        rest += tl.sum(tl.where(tied, part_rest, shrunk), 0)
        ties += tl.sum(tl.where(tied, part_ties, 0.0), 0)
        most = highest
        if KINDS == 4:
            positives += tl.sum(tl.load(at + 3 * size, mask=mask, other=0.0), 0)
    tl.store(out + col, most, mask=inside)
    tl.store(out + out_stride + col, ties, mask=inside)
    tl.store(out + 2 * out_stride + col, rest, mask=inside)
    if KINDS == 4:
        tl.store(out + 3 * out_stride + col, positives, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _contrastive_loss_sum_kernel(
    row_terms, column_terms, counts, stats, loss, rows, BLOCK: tl.constexpr
):
    # one program: statistics for backward, and the loss, in float64
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < rows
        inverse_count = 1.0 / tl.load(counts + row, mask=mask, other=1.0)
        tl.store(stats + 5 * rows + row, inverse_count, mask=mask)
        positive = tl.load(row_terms + 3 * rows + row, mask=mask, other=0.0).to(tl.float64)
        positive *= inverse_count
        for axis in tl.static_range(2):
            terms = row_terms + row if axis == 0 else column_terms + row
            most = tl.load(terms, mask=mask, other=0.0)
            ties = tl.load(terms + rows, mask=mask, other=1.0)
            rest = tl.load(terms + 2 * rows, mask=mask, other=0.0)
            tl.store(stats + 2 * axis * rows + row, most, mask=mask)
            tl.store(stats + (2 * axis + 1) * rows + row, 1.0 / (ties + rest), mask=mask)
            logarithm = tl.log(ties.to(tl.float64) + rest.to(tl.float64))
            total += tl.where(mask, most.to(tl.float64) - positive + logarithm, 0.0)
    tl.store(loss, (tl.sum(total, 0) / (2.0 * rows)).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "columns"])
def _contrastive_loss_bwd_kernel(
    v,
    t,
    labels,
    column_labels,
    inverse_counts,
    row_max,
    row_inverse,
    column_max,
    column_inverse,
    temperature,
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
    s = _logits(g, temperature)
    same = same_labels(labels, column_labels, row, col, rows, columns)
    weight = tl.load(inverse_counts + row, mask=row < rows, other=0.0)
    target = tl.where(same, weight[:, None], 0.0)
    by_row = s - tl.load(row_max + row, mask=row < rows, other=0.0)[:, None]
    inverse = tl.load(row_inverse + row, mask=row < rows, other=0.0)
    ds_row = tl.exp(by_row) * inverse[:, None] - target
    by_column = s - tl.load(column_max + col, mask=col < columns, other=0.0)[None, :]
    inverse = tl.load(column_inverse + col, mask=col < columns, other=0.0)
    ds_column = tl.exp(by_column) * inverse[None, :] - target
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    # ds sums to 0 along rows and columns: s may count from their maxima, and nothing large cancels
    total = tl.where(inside, ds_row * by_row + ds_column * by_column, 0.0)
    at = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + at, tl.sum(tl.sum(total, 1), 0))
    if dg is not None:
        grad = tl.where(inside, ds_row + ds_column, 0.0)
        store_gradients(dg, grad, row, col, part_stride, row_stride, RAISE)


def contrastive_loss_fwd(
    v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/contrastive_loss.py.

    The second result, [6, B]: maximum and inverse sum of rows and of columns, labels, 1 / counts.
    """
    rows = len(v)
    loss = torch.full((), torch.nan, device=v.device)
    stats = torch.empty(6, rows, dtype=torch.float32, device=v.device)
    if rows == 0:
        return loss, stats
    labels, counts = labels_and_counts(ids, rows, v.device)
    stats[4] = labels
    row_terms, column_terms = _terms((v, t), (labels, labels), temperature)
    _contrastive_loss_sum_kernel[(1,)](
        row_terms,
        column_terms,
        counts,
        stats,
        loss,
        rows,
        BLOCK=1024,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return loss, stats


def statistics(
    pair: tuple[Tensor, Tensor],  # [M, D], [N, D]
    labels: tuple[Tensor, Tensor],  # [M], [N] float32
    temperature: Tensor,  # []
) -> tuple[Tensor, Tensor, Tensor]:
    """A part of a larger loss: what its rows and columns have, and how much its positives are.

    Returns:
        [3, M] and [3, N]: the maximum, how often it occurs, and the sum of the other e^(s -
        maximum); and [M] the sums of positive logits.
    """
    row_terms, column_terms = _terms(pair, labels, temperature)
    return row_terms[:3], column_terms, row_terms[3]


def _terms(
    pair: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], temperature: Tensor
) -> tuple[Tensor, Tensor]:
    v, t = (x.contiguous() for x in pair)
    (rows, dim), columns, tile = v.shape, len(t), tile_of(v.dtype)
    temperature = temperature.to(v.device)
    most = min(rows, STRIP)
    down, across = tile.blocks(most, columns)
    row_terms = torch.empty(4, rows, dtype=torch.float32, device=v.device)
    row_parts = row_terms.new_empty(across, 4, most)
    column_parts = row_terms.new_empty(1 + down, 3, columns)
    for strip in strips(rows, STRIP):
        own = v[strip]
        grid = tile.blocks(len(own), columns)[::-1]
        _contrastive_loss_fwd_kernel[grid](
            own,
            t,
            labels[0][strip],
            labels[1],
            temperature,
            row_parts,
            column_parts,
            len(own),
            columns,
            D=dim,
            **tile.options(),
        )
        _join(row_parts, row_terms[:, strip], 0, grid[0])
        _join(column_parts, column_parts[0], 0 if strip.start else 1, 1 + grid[1])
    return row_terms, column_parts[0]


def _join(parts: Tensor, out: Tensor, first: int, count: int) -> None:
    kinds, size = out.shape
    _contrastive_loss_join_kernel[(triton.cdiv(size, _JOINED),)](
        parts,
        out,
        size,
        out.stride(0),
        first,
        count,
        KINDS=kinds,
        PARTS=_JOINED,
        COLS=_JOINED,
        num_warps=4,
        enable_fp_fusion=True,
    )


def contrastive_loss_bwd(
    dloss: Tensor, v: Tensor, t: Tensor, temperature: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of v, t and temperature; of v and t empty where not needed."""
    if len(v) == 0:
        dv, dt = (v.new_zeros(v.shape if need else 0) for need in needs)
        return dv, dt, torch.zeros_like(temperature)
    row_max, row_inverse, column_max, column_inverse, labels, counts = stats
    sums = (row_max, row_inverse, column_max, column_inverse)
    parts = (labels, labels, counts)
    dv, dt, dscale = _gradients(dloss, (v, t), parts, sums, temperature, needs, v.dtype)
    scale = 1 / temperature.double().to(v.device)
    return dv, dt, (-dscale * scale.square()).to(temperature)


def part_gradients(
    dloss: Tensor,  # []
    pair: tuple[Tensor, Tensor],  # [M, D], [N, D]
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: Tensor,  # []
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part of a larger loss, float32, and that of 1 / temperature, float64.

    Those not needed are empty. dloss is of a mean over M. parts: labels [M], column labels [N],
    1 / counts [M], and maximum and inverse sum of rows and of columns [2 * M + 2 * N].
    """
    rows, columns = (len(x) for x in pair)
    *labels, stats = parts
    sums = stats.split([rows, rows, columns, columns])
    return _gradients(dloss, pair, labels, sums, temperature, needs, torch.float32)


def _gradients(
    dloss: Tensor,
    pair: tuple[Tensor, Tensor],
    parts: Sequence[Tensor],  # labels, column labels, 1 / counts
    stats: Sequence[Tensor],  # of rows and of columns: maximum, inverse sum
    temperature: Tensor,
    needs: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    v, t = (x.contiguous() for x in pair)
    (rows, dim), columns = v.shape, len(t)
    labels, column_labels, inverse_counts = parts
    row_max, row_inverse, column_max, column_inverse = stats
    to_s, temperature = dloss.double() / (2 * rows), temperature.to(v.device)
    grads = PairGradients(v, t, to_s / temperature.double(), needs, dtype)
    tile, sums = grads.tile, []
    for strip in grads.strips:
        own = v[strip]
        grid = tile.blocks(len(own), columns)[::-1]
        sums.append(torch.empty(grid[0] * grid[1], dtype=torch.float32, device=v.device))
        _contrastive_loss_bwd_kernel[grid](
            own,
            t,
            labels[strip],
            column_labels,
            inverse_counts[strip],
            row_max[strip],
            row_inverse[strip],
            column_max,
            column_inverse,
            temperature,
            grads.dg,
            sums[-1],
            len(own),
            columns,
            *grads.strides,
            D=dim,
            RAISE=grads.raised,
            # with fewer, what both softmaxes need does not fit in registers
            **tile._replace(warps=2 * tile.warps).options(),
        )
        grads.add(strip)
    # s = g scale, and the sum is of ds s
    dscale = torch.cat(sums).sum(dtype=torch.float64) * to_s * temperature.double()
    return grads.dv, grads.dt, dscale
