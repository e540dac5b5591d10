"""What losses over all pairs of a row of v and a row of t share: tiles of G = v t^T, and their use.

A program multiplies one tile of G, over D in steps, and works it up while it is in registers;
nothing of G is stored. What rows and columns get from a tile is stored by tile and joined in the
order of the tiles by a second kernel, so that no result depends on which program ends first. Rows
are taken in strips, one launch after the other, so that what is stored grows with the rows and not
with the pairs.

Backward: the tiles of a strip leave dloss/dG, and two products follow, dG t for the strip's rows of
dv and dG^T v to add to dt. Products of dloss/dG cancel, and would not when rounded to 16 bits: a
16-bit dG is kept as the sum of two numbers, and multiplied by tensor cores twice. With the product
for G these are three GEMMs for float32 and five for 16 bits. The tensor cores bound them, or for
float32, which is multiplied in full precision, the other cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.triton.gemm import Tile

# Rows of a strip, whole tiles: enough tiles to fill a GPU.
STRIP = 4096
# In backward, where the strip's dG is stored.
GRADIENT_STRIP = 2048
# Multiplies a 16-bit dG, whose numbers are at most 2: small ones stay in float16's range.
_RAISE = 2.0**14


def tile_of(dtype: torch.dtype) -> Tile:
    """Float32 is multiplied without tensor cores, in smaller tiles."""
    return Tile(64, 64, 32, 4, 3) if dtype == torch.float32 else Tile(64, 128, 64, 4, 3)


def strips(rows: int, size: int) -> Iterator[slice]:
    """The rows in strips of `size`."""
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def labels_and_counts(
    ids: Tensor | None,  # [B]
    rows: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Ids as whole float32 numbers, and how many rows share each; nothing is read back."""
    if ids is None:
        labels = torch.arange(rows, dtype=torch.float32, device=device)
        return labels, torch.ones_like(labels)
    ids = ids.contiguous()
    ordered = ids.sort().values
    first = torch.searchsorted(ordered, ids)
    return first.float(), (torch.searchsorted(ordered, ids, right=True) - first).float()


@triton.jit
def pair_products(
    v,
    t,
    row,
    column,
    rows,
    columns,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of v t^T; rows and columns past the end repeat the last one."""
    k = tl.arange(0, BLOCK_K)
    a = v + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * D + k[None, :]
    b = t + tl.minimum(column, columns - 1).to(tl.int64)[None, :] * D + k[:, None]
    g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            a_tile, b_tile = tl.load(a + start), tl.load(b + start)
        else:
            a_tile = tl.load(a + start, mask=(k < D - start)[None, :], other=0.0)
            b_tile = tl.load(b + start, mask=(k < D - start)[:, None], other=0.0)
        g = tl.dot(a_tile, b_tile, g, input_precision="ieee")
    return g


@triton.jit
def same_labels(labels, column_labels, row, column, rows, columns):
    """A tile of where labels are equal, false past the end."""
    label = tl.load(labels + row, mask=row < rows, other=-1.0)
    other = tl.load(column_labels + column, mask=column < columns, other=-2.0)
    return label[:, None] == other[None, :]


@triton.jit
def store_gradients(dg, grad, row, column, part_stride, row_stride, RAISE: tl.constexpr):
    """Write a tile of dG, in one part or two."""
    at = row.to(tl.int64)[:, None] * row_stride + column[None, :]
    raised = grad * RAISE
    high = raised.to(dg.dtype.element_ty)
    tl.store(dg + at, high)
    if dg.dtype.element_ty != tl.float32:
        low = (raised - high.to(tl.float32)).to(dg.dtype.element_ty)
        tl.store(dg + part_stride + at, low)


@triton.jit(do_not_specialize=["rows", "depth"])
def _pair_gradients_kernel(
    dg,
    x,
    factor,
    sums,
    out,
    rows,
    depth,
    part_stride,
    row_stride,
    D: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    RAISE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # factor dG x, or dG^T x, of a strip: the first one starts sums, and the last one stores out; dG
    # is whole tiles, of zeros past the end
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        a = dg + k.to(tl.int64)[:, None] * row_stride + row[None, :]
        step = row_stride.to(tl.int64) * BLOCK_K
    else:
        a = dg + row.to(tl.int64)[:, None] * row_stride + k[None, :]
        step = BLOCK_K
    b = x + k.to(tl.int64)[:, None] * D + col[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        mask = (k < depth - start)[:, None]
        if D % BLOCK_N != 0:
            mask = mask & (col < D)[None, :]
        b_tile = tl.load(b, mask=mask, other=0.0)
        a_tile = tl.load(a)
        if TRANSPOSED:
            a_tile = tl.trans(a_tile)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        if dg.dtype.element_ty != tl.float32:
            a_tile = tl.load(a + part_stride)
            if TRANSPOSED:
                a_tile = tl.trans(a_tile)
            total = tl.dot(a_tile, b_tile, total)
        a += step
        b += BLOCK_K * D
    total *= tl.load(factor).to(tl.float32) / RAISE
    mask = (row < rows)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    if not FIRST:
        total += tl.load(sums + at, mask=mask, other=0.0)
    if LAST:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(sums + at, total, mask=mask)


class PairGradients:
    """dv and dt of a loss, strip by strip: its kernel fills ``dg``, and ``add`` multiplies."""

    def __init__(
        self,
        v: Tensor,  # [M, D], contiguous
        t: Tensor,  # [N, D], contiguous
        factor: Tensor,  # [] that dG lacks
        needs: list[bool],
        dtype: torch.dtype,
    ) -> None:
        (rows, self._dim), columns = v.shape, len(t)
        self.v, self.t, self._factor, self._needs = v, t, factor, needs
        self.tile = tile_of(v.dtype)
        self.strips = list(strips(rows, GRADIENT_STRIP))
        self.raised = 1.0 if v.dtype == torch.float32 else _RAISE
        self.dv, self.dt = (
            x.new_empty(x.shape if need else 0, dtype=dtype)
            for x, need in zip((v, t), needs, strict=True)
        )
        # dt of the strips so far
        self._sums: Tensor | None = None
        if needs[1] and len(self.strips) > 1:
            self._sums = torch.empty_like(t, dtype=torch.float32)
        self.dg: Tensor | None = None
        if any(needs):
            height, width = (
                triton.cdiv(size, block) * block
                for size, block in (
                    (min(rows, GRADIENT_STRIP), self.tile.m),
                    (columns, self.tile.n),
                )
            )
            self.dg = v.new_empty(1 if v.dtype == torch.float32 else 2, height, width)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of dg: from part to part and from row to row."""
        return (0, 0) if self.dg is None else self.dg.stride()[:2]

    def add(self, strip: slice) -> None:
        """The products of dg, which is the strip's."""
        if self._needs[0]:
            self._multiply(self.t, self.dv[strip], None, False, True, True)
        if self._needs[1]:
            ends = strip.start == 0, strip.stop == len(self.v)
            self._multiply(self.v[strip], self.dt, self._sums, True, *ends)

    def _multiply(
        self, x: Tensor, out: Tensor, sums: Tensor | None, transposed: bool, first: bool, last: bool
    ) -> None:
        rows = len(out)
        tile = Tile(64, 64, 32, 4, 3) if x.dtype == torch.float32 else Tile(64, 128, 32, 4, 4)
        _pair_gradients_kernel[tile.blocks(rows, self._dim)[::-1]](
            self.dg,
            x,
            self._factor,
            sums,
            out,
            rows,
            len(x),
            *self.strides,
            D=self._dim,
            TRANSPOSED=transposed,
            FIRST=first,
            LAST=last,
            RAISE=self.raised,
            **tile.options(),
        )
