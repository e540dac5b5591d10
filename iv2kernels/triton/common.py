"""What the Triton kernels share: the size of a tile of whole rows, and sums over rows.

A gradient that is summed over rows (of a weight, a bias) is summed in two steps of a fixed order:
each program sums a chunk of rows and stores a float32 partial row, then ``sum_partials`` adds the
partial rows. The chunks depend on the number of rows alone, never on the device or on which program
ends first, so that the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# At most so many chunks: enough for a few on every multiprocessor.
_CHUNKS = 512
_LEAST_ROWS = 8


def row_tile(dim: int, elements: int) -> tuple[int, int, int]:
    """Rows, columns (all, padded to a power of two) and warps of a tile of about `elements`.

    A thread has elements / 128 of them, 32 warps at most.
    """
    columns = max(triton.next_power_of_2(dim), 16)
    rows = min(max(elements // columns, 1), 32)
    warps = min(max(4 * rows * columns // elements, 1), 32)
    return rows, columns, warps


def row_chunks(rows: int, tile: int) -> tuple[int, int]:
    """Rows of a chunk, a multiple of `tile`, and how many chunks there are."""
    least = max(triton.cdiv(rows, _CHUNKS), _LEAST_ROWS)
    chunk = triton.cdiv(least, tile) * tile
    return chunk, triton.cdiv(rows, chunk)


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(
    partials, out, second, count, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # one program for COLS columns: partial rows in order, ROWS at a time, then those in a tree
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = col < C
    partials += tl.program_id(1).to(tl.int64) * count * C
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.load(partials + row[:, None] * C + col[None, :], mask=mask, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(out + col, tl.sum(total, 0), mask=inside)
    else:
        tl.store(second + col, tl.sum(total, 0), mask=inside)


def sum_partials(partials: Tensor) -> tuple[Tensor, ...]:  # float32 [1 or 2, P, C] -> 1 or 2 [C]
    """The sums over P, as tensors of their own, always added in the same order."""
    kinds, count, dim = partials.shape
    sums = [torch.empty(dim, dtype=torch.float32, device=partials.device) for _ in range(kinds)]
    grid = (triton.cdiv(dim, 32), kinds)
    _sum_partials_kernel[grid](
        partials, sums[0], sums[-1], count, C=dim, ROWS=32, COLS=32, enable_fp_fusion=True
    )
    return tuple(sums)
