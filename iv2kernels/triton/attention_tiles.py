"""Tiles of attention's operands: rows of a head in pieces whose widths are powers of two.

Triton's tiles are powers of two, but head_dim 88 in a tile of 128 would multiply 45 % too much. It
is cut into 64 + 32 instead, 200 into 128 + 64 + 16: the powers of two, 16 or more, that add up to
head_dim rounded up to 16. A tile of rows is a tuple of pieces, and a product with it that many
dots. Here too is how large tiles are: as large as nothing spills at (tests/gates), those of small
blocks (attention_blocks.py) with them. The pass over keys keeps two sums of all columns: at
head_dim 200, in 16 bits, it needs two steps in flight for that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from iv2kernels.tiles import Knob, choose


class Tile(NamedTuple):
    """Of one program: rows that it keeps, rows of a step of its loop, warps, steps in flight."""

    rows: int
    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of the three kernels: keeps queries, queries and keys."""

    forward: Tile
    dq: Tile
    dkdv: Tile


def tiles_for(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The default sizes; float32 is multiplied without tensor cores, from registers.

    Where tensor cores read registers alone, the pass over keys takes fewer rows at once.
    """
    width = sum(_pieces(head_dim))
    if dtype == torch.float32:
        if width <= 96:
            tile = Tile(32, 32, 8, 2)
            return Tiles(tile if width <= 64 else Tile(32, 16, 8, 2), tile, tile)
        return Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1))
    if width <= 64:
        dkdv = Tile(64, 32 if _operands_in_registers() else 64, 4, 2)
        return Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), dkdv)
    if width <= 128:
        dkdv = Tile(64, 32, 4, 2)
        if _operands_in_registers():
            dkdv = Tile(64, 32 if len(_pieces(head_dim)) == 1 else 16, 8, 2)
        return Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), dkdv)
    return Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 16, 8, 2))


def _operands_in_registers() -> bool:
    """Of NVIDIA's GPUs only sm_90 and sm_100 multiply what lies in shared memory."""
    if triton.knobs.runtime.interpret:
        return False
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # no GPU
        return False
    return bool(target.backend == "cuda" and target.arch // 10 not in (9, 10))


# What tune may try in place of the default in 16 bits, up to the width of the first column.
_ALTERNATIVES = (
    (
        64,
        Tiles(Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3)),
    ),
    (
        128,
        Tiles(Tile(64, 32, 4, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 2), Tile(64, 16, 4, 3)),
    ),
)


def alternatives(head_dim: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """The whole search space."""
    width = sum(_pieces(head_dim))
    if dtype == torch.float32:
        return ()
    return next((tuple(found) for most, *found in _ALTERNATIVES if width <= most), ())


def dense_tile(kernel: str, head_dim: int, dtype: torch.dtype, norm: bool) -> Tile:
    """A kernel's of ``tiles_for``, or what was found better on this GPU, without lists."""
    default, *others = (
        getattr(tiles, kernel)
        for tiles in (tiles_for(head_dim, dtype), *alternatives(head_dim, dtype))
    )
    knob = Knob(f"attention_{kernel}{'_norm' if norm else ''}", head_dim, dtype)
    return choose(knob, default, others)


@triton.constexpr_function
def _pieces(head_dim):
    rest = (head_dim + 15) // 16 * 16
    return tuple(1 << bit for bit in reversed(range(4, rest.bit_length())) if rest >> bit & 1)


@triton.constexpr_function
def num_pieces(head_dim):
    """How many pieces a head is cut into."""
    return len(_pieces(head_dim))


@triton.constexpr_function
def piece_size(head_dim, i):
    """The columns of a piece."""
    return _pieces(head_dim)[i]


@triton.constexpr_function
def piece_start(head_dim, i):
    """The first column of a piece."""
    return sum(_pieces(head_dim)[:i])


@triton.jit
def piece_columns(D: tl.constexpr, i: tl.constexpr):
    """The columns of a piece, some of the last one beyond D."""
    return piece_start(D, i) + tl.arange(0, piece_size(D, i))


@triton.jit
def load_rows(
    x, first, end, ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows from `first` on; zeros from `end` on, where MASKED."""
    x += tl.cast(first, tl.int64) * STRIDE
    row = tl.arange(0, ROWS)
    pieces = ()
    for i in tl.static_range(num_pieces(D)):
        col = piece_columns(D, i)
        inside = (col < D)[None, :]
        if MASKED:
            inside = inside & (row < end - first)[:, None]
        at = row[:, None] * STRIDE + col[None, :]
        pieces += (tl.load(x + at, mask=inside, other=0.0),)  # type: ignore[assignment]
    return pieces


@triton.jit
def store_rows(x, pieces, first, end, ROWS: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows from `first` on, but not from `end` on."""
    x += tl.cast(first, tl.int64) * STRIDE
    row = tl.arange(0, ROWS)
    for i in tl.static_range(num_pieces(D)):
        col = piece_columns(D, i)
        inside = (row < end - first)[:, None] & (col < D)[None, :]
        at = row[:, None] * STRIDE + col[None, :]
        tl.store(x + at, pieces[i].to(x.dtype.element_ty), mask=inside)


@triton.jit
def zero_rows(ROWS: tl.constexpr, D: tl.constexpr):
    """Sums of rows, in float32."""
    pieces = ()
    for i in tl.static_range(num_pieces(D)):
        pieces += (tl.zeros([ROWS, piece_size(D, i)], tl.float32),)  # type: ignore[assignment]
    return pieces


@triton.jit
def scale_rows(pieces, by):
    """Each row times its factor."""
    scaled = ()
    for i in tl.static_range(len(pieces)):
        scaled += (pieces[i] * by[:, None],)
    return scaled


@triton.jit
def scores(a, b):
    """The products of all rows of a with all rows of b: a bᵀ."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def add_product(sums, weights, rows):
    """Sums, with weights times rows added."""
    weights = weights.to(rows[0].dtype)
    added = ()
    for i in tl.static_range(len(rows)):
        added += (tl.dot(weights, rows[i], sums[i], input_precision="ieee"),)
    return added


@triton.jit
def head_of(
    x,
    cu_seqlens,
    sequence,
    head,
    stride_b,
    stride_h,
    TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The first row of a sequence; strides are in UNITs, so that alignment is known."""
    x += head.to(tl.int64) * stride_h * UNIT
    if PACKED:
        x += tl.load(cu_seqlens + sequence).to(tl.int64) * TOKEN
    else:
        x += sequence.to(tl.int64) * stride_b * UNIT
    return x


@triton.jit
def sequence_of(cu_seqlens, sequence, length, PACKED: tl.constexpr):
    """The number of its first row over the whole batch, and its length."""
    if PACKED:
        first = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - first
    else:
        first = sequence * length
    return first, length


@triton.jit
def tile_of(tiles, i, length, ROWS: tl.constexpr, LISTS: tl.constexpr):
    """Its first row and the end of its rows; its first run and the end of its runs."""
    if LISTS:
        tiles += 4 * i
        first, run, last_run = tl.load(tiles), tl.load(tiles + 2), tl.load(tiles + 3)
        end = first + tl.load(tiles + 1)
    else:
        first, end, run, last_run = i * ROWS, length, 0, 1
    return first, end, run, last_run


@triton.jit
def run_of(runs, i, length, LISTS: tl.constexpr):
    """The first token of a run and its end."""
    if LISTS:
        begin, end = tl.load(runs + 2 * i), tl.load(runs + 2 * i + 1)
    else:
        begin, end = 0, length
    return begin, end


@triton.jit
def normed_rows(rows, rstd, gain, first, end, ROWS: tl.constexpr, D: tl.constexpr):
    """Queries times their own factor and that of each channel."""
    row = tl.arange(0, ROWS)
    factor = tl.load(rstd + first + row, mask=row < end - first, other=0.0)
    normed = ()
    for i in tl.static_range(num_pieces(D)):
        col = piece_columns(D, i)
        weight = tl.load(gain + col, mask=col < D, other=0.0)
        piece = rows[i].to(tl.float32) * factor[:, None] * weight[None, :]
        normed += (piece.to(rows[i].dtype),)  # type: ignore[assignment]
    return normed
