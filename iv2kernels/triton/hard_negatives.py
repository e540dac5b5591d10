"""hard_negatives in Triton: the largest score + Gumbel noise of each row and of each column.

A program for each tile of the scores (pair_tiles.py) adds the noise of both directions, made on the
spot, and stores the best of its rows and of its columns; a second kernel compares them tile by
tile, in order, and carries the columns' from strip to strip. Ties go to the lower index.
A Philox block is four words of noise: along the columns of a row with its seed, and along the rows
of a column with the column's. The noise has the same bits as the CPU's: multiplications and
additions are not contracted, the logarithm is written out, and its division is rounded to nearest.
Values are not checked: looking at them would wait for the GPU. Bound by the noise, some 60
instructions for a score and direction.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.ops.hard_negatives import STREAM
from iv2kernels.ops.masks import LOG2_COEFFICIENTS
from iv2kernels.triton.pair_tiles import STRIP, pair_products, strips

_LOG2 = tl.constexpr(LOG2_COEFFICIENTS)
_STREAM_HIGH = tl.constexpr(STREAM >> 32)
# Rows and columns of a tile.
_BLOCK = 64
# Rows or columns of which a program compares the tiles.
_JOINED = 128


@triton.jit
def _minus_log2(x):
    # ops/masks.py: minus_log2
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    p = z * _LOG2[4] + _LOG2[3]
    p = p * z + _LOG2[2]
    p = p * z + _LOG2[1]
    p = p * z + _LOG2[0]
    return -(s * p + exponent.to(tl.float32))


@triton.jit
def _gumbel(word):
    uniform = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return _minus_log2(_minus_log2(uniform))


@triton.jit
def _noise(seed, first, DIRECTION: tl.constexpr, COUNT: tl.constexpr):
    # [seeds, COUNT] from the words `first` on, a multiple of 4
    block = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = tl.philox(seed[:, None], block[None, :], DIRECTION, 0, _STREAM_HIGH)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return _gumbel(words)


@triton.jit
def _store_best(best, index, at, mask, keys, place, AXIS: tl.constexpr):
    most = tl.max(keys, AXIS)
    tied = keys == tl.expand_dims(most, AXIS)
    lowest = tl.min(tl.where(tied, tl.expand_dims(place, 1 - AXIS), 0x7FFFFFFF), AXIS)
    tl.store(best + at, most, mask=mask)
    tl.store(index + at, lowest, mask=mask)


@triton.jit(do_not_specialize=["rows", "columns", "first"])
def _hard_negatives_draw_kernel(
    v,
    t,
    classes,
    seeds,
    scale,
    row_best,
    row_index,
    column_best,
    column_index,
    rows,
    columns,
    first,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # a strip: its row r is row `first` + r of all, first a multiple of 4
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = pair_products(v, t, row, col, rows, columns, D, BLOCK_M, BLOCK_N, BLOCK_K)
    scores = g * tl.load(scale)
    own = tl.load(classes + first + row, mask=row < rows, other=0)
    other = tl.load(classes + col, mask=col < columns, other=0)
    inside = (row < rows)[:, None] & (col < columns)[None, :]
    fits = inside & (own[:, None] != other[None, :])

    seed = tl.load(seeds + first + row, mask=row < rows, other=0)
    noise = _noise(seed, tl.program_id(0) * BLOCK_N, 0, BLOCK_N)
    keys = tl.where(fits, scores + noise, float("-inf"))
    at = tl.program_id(0).to(tl.int64) * rows + row
    _store_best(row_best, row_index, at, row < rows, keys, col, 1)

    seed = tl.load(seeds + col, mask=col < columns, other=0)
    noise = tl.trans(_noise(seed, first + tl.program_id(1) * BLOCK_M, 1, BLOCK_M))
    keys = tl.where(fits, scores + noise, float("-inf"))
    # the first part is that of the strips before
    at = (tl.program_id(1) + 1).to(tl.int64) * columns + col
    _store_best(column_best, column_index, at, col < columns, keys, first + row, 0)


@triton.jit(do_not_specialize=["size", "first", "count"])
def _hard_negatives_join_kernel(best, index, chosen, size, first, count, COLS: tl.constexpr):
    # the best of parts [count, size] from `first` on, which becomes part 0; -1 where all are -inf
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = col < size
    most = tl.full([COLS], float("-inf"), tl.float32)
    found = tl.full([COLS], -1, tl.int32)
    for part in range(first, count):
        at = tl.cast(part, tl.int64) * size + col
        key = tl.load(best + at, mask=inside, other=float("-inf"))
        better = key > most
        found = tl.where(better, tl.load(index + at, mask=inside, other=-1), found)
        most = tl.where(better, key, most)
    tl.store(best + col, most, mask=inside)
    tl.store(index + col, found, mask=inside)
    tl.store(chosen + col, found, mask=inside)


def hard_negatives_draw(
    v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None, seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/hard_negatives.py."""
    rows, device = len(v), v.device
    neg_t, neg_v = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    if rows == 0:
        return neg_t, neg_v
    if v.shape[1] == 0:  # all similarities are 0
        v = t = v.new_zeros(rows, 1)
    if t.dtype != v.dtype:
        v, t = v.float(), t.float()
    v, t, seeds = v.contiguous(), t.contiguous(), seeds.contiguous()
    classes = torch.arange(rows, device=device) if ids is None else ids.contiguous()
    scale = _scale(temperature, device)
    block_k = 32 if v.dtype == torch.float32 else 64
    across, most = triton.cdiv(rows, _BLOCK), min(rows, STRIP)
    # parts of rows, and of columns after what the strips before have found
    row_best, row_index = _best(across, most, device)
    column_best, column_index = _best(1 + triton.cdiv(most, _BLOCK), rows, device)
    for strip in strips(rows, STRIP):
        own = v[strip]
        down = triton.cdiv(len(own), _BLOCK)
        _hard_negatives_draw_kernel[(across, down)](
            own,
            t,
            classes,
            seeds,
            scale,
            row_best,
            row_index,
            column_best,
            column_index,
            len(own),
            rows,
            strip.start,
            D=v.shape[1],
            BLOCK_M=_BLOCK,
            BLOCK_N=_BLOCK,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=2,
            # for the bits of the noise
            enable_fp_fusion=False,
        )
        _join(row_best, row_index, neg_t[strip], 0, across)
        _join(column_best, column_index, neg_v, 0 if strip.start else 1, 1 + down)
    return neg_t, neg_v


def _scale(temperature: Tensor, device: torch.device) -> Tensor:
    """What scores are multiplied by: noise is in units of ln 2."""
    scale = (math.log2(math.e) / temperature.double()).float()
    if scale.device == device:
        return scale
    # a number: given to a kernel, as a copy would wait
    return torch.full((), scale.item(), device=device)


def _best(parts: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    best = torch.empty(parts, size, dtype=torch.float32, device=device)
    return best, torch.empty_like(best, dtype=torch.int32)


def _join(best: Tensor, index: Tensor, found: Tensor, first: int, count: int) -> None:
    size = len(found)
    _hard_negatives_join_kernel[(triton.cdiv(size, _JOINED),)](
        best,
        index,
        found,
        size,
        first,
        count,
        COLS=_JOINED,
        num_warps=4,
        enable_fp_fusion=True,
    )
