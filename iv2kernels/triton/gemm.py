"""A tile of a matrix product, and its size: what linear, mlp and linear_cross_entropy share.

The sum runs over the depth, the serial axis, in blocks that are copied asynchronously a few ahead;
it is kept in float32, and float32 inputs are multiplied in full precision. Each kernel adds its own
epilogue, for which the tile is still in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Programs that keep every multiprocessor of a large GPU busy.
BUSY = 128


@triton.jit
def tile_product(
    a,
    b,
    row,
    col,
    rows,
    cols,
    depth,
    A_ROW: tl.constexpr,
    A_DEPTH: tl.constexpr,
    B_DEPTH: tl.constexpr,
    B_COL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A_PADDED: tl.constexpr = False,
):
    """The tile [row, col] of a @ b, in float32; beyond rows, cols and depth is nothing.

    A_ROW and the like are strides. A_PADDED: a has zeros beyond depth, up to a multiple of BLOCK_K.
    """
    k = tl.arange(0, BLOCK_K)
    a += row.to(tl.int64)[:, None] * A_ROW + k.to(tl.int64)[None, :] * A_DEPTH
    b += col.to(tl.int64)[None, :] * B_COL + k.to(tl.int64)[:, None] * B_DEPTH
    total = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        a_mask = (row < rows)[:, None]
        if not A_PADDED:
            a_mask &= inside[None, :]
        a_tile = tl.load(a, mask=a_mask, other=0.0)
        b_tile = tl.load(b, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += BLOCK_K * A_DEPTH
        b += BLOCK_K * B_DEPTH
    return total


@triton.jit
def grouped(program, row_blocks, col_blocks, GROUP: tl.constexpr):
    """The block of rows and of columns of a program.

    Programs that run at the same time share the columns' blocks and GROUP blocks of rows, which
    then come from the L2 cache.
    """
    first = program // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * col_blocks)
    return first + within % height, within // height


class Tile(NamedTuple):
    """The constants of a launch: rows, columns and depth of a tile, warps, stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def blocks(self, rows: int, cols: int) -> tuple[int, int]:
        """How many tiles cover a matrix, down and across."""
        return triton.cdiv(rows, self.m), triton.cdiv(cols, self.n)

    def options(self) -> dict[str, int | bool]:
        """As keywords of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


def largest_tile(dtype: torch.dtype) -> Tile:
    """For matrices of any size; float32 has no tensor cores to feed."""
    return Tile(64, 64, 32, 4, 3) if dtype == torch.float32 else Tile(128, 128, 64, 8, 3)


def alternatives(dtype: torch.dtype) -> tuple[Tile, ...]:
    """What tune may try for linear in place of the largest: the whole search space."""
    if dtype == torch.float32:
        return ()
    return Tile(128, 128, 32, 4, 4), Tile(128, 64, 64, 4, 4), Tile(128, 256, 64, 8, 3)


def tile_for(rows: int, cols: int, dtype: torch.dtype) -> Tile:
    """The largest tile of which a matrix has enough."""
    tile = largest_tile(dtype)
    down, across = tile.blocks(rows, cols)
    return tile if down * across >= BUSY else Tile(64, 64, tile.k, 4, 3)
