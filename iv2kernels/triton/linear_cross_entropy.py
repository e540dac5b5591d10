"""linear_cross_entropy in Triton: logits exist only in registers, a tile at a time.

The rows that count are brought to the front by a stable sort, and how many there are stays on the
GPU: programs past the last one return at once, and nothing waits.
Forward: a program for 128 rows and a part of the vocabulary walks over its tiles of logits, the
serial axis, with a running maximum and sum for each row; a second kernel joins the parts in order.
Gradients, in the forward pass as the op wants them: for a slice of the vocabulary at a time, tiles
of logits are computed again, p - y is formed in float32 and rounded once into a scratch matrix of
at most 64 MiB, and two GEMMs multiply it: the slice of dweight is complete after one, over all
rows in float32; dx grows slice by slice in float32, in a fixed number of parts.
Four GEMMs (iv2kernels/triton/gemm.py), bound by the tensor cores; exponentials are a few percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.ops.linear_cross_entropy import dweight_dtype
from iv2kernels.triton.common import row_tile, sum_partials
from iv2kernels.triton.gemm import BUSY, largest_tile, tile_product

# Bytes of the scratch matrix, and its fewest columns.
_SCRATCH_BYTES, _LEAST_COLUMNS = 64 << 20, 1024
# Parts of a long sum, at most: of the vocabulary in forward, and for dx.
_PARTS, _DX_PARTS = 64, 8


@triton.jit
def _logits(x, weight, bias, row, col, rows, vocabulary, C: tl.constexpr, BLOCK_K: tl.constexpr):
    total = tile_product(x, weight, row, col, rows, vocabulary, C, C, 1, 1, C, BLOCK_K)
    if bias is not None:
        total += tl.load(bias + col, mask=col < vocabulary, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["vocabulary", "part", "size"])
def _linear_cross_entropy_fwd_kernel(
    x,
    weight,
    bias,
    target,
    count,
    partials,
    vocabulary,
    part,
    size,
    C: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # partials [parts, 4, size]: of each row the maximum, the sum of exponentials, the target's
    # logit and, to smooth, the sum of all logits
    rows = tl.load(count)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= rows:
        return
    goal = tl.load(target + row, mask=row < rows, other=-1)
    top = tl.full([BLOCK_M], -3.4e38, tl.float32)
    exps = tl.zeros([BLOCK_M], tl.float32)
    hit = tl.zeros([BLOCK_M], tl.float32)
    plain = tl.zeros([BLOCK_M], tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, vocabulary), BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        logits = _logits(x, weight, bias, row, col, rows, vocabulary, C, BLOCK_K)
        hit += tl.sum(tl.where(col[None, :] == goal[:, None], logits, 0.0), 1)
        inside = (col < vocabulary)[None, :]
        if SMOOTH:
            plain += tl.sum(tl.where(inside, logits, 0.0), 1)
        logits = tl.where(inside, logits, float("-inf"))
        above = tl.maximum(top, tl.max(logits, 1))
        exps = exps * tl.exp(top - above) + tl.sum(tl.exp(logits - above[:, None]), 1)
        top = above
    partials += tl.program_id(1).to(tl.int64) * 4 * size + row
    tl.store(partials, top, mask=row < rows)
    tl.store(partials + size, exps, mask=row < rows)
    tl.store(partials + 2 * size, hit, mask=row < rows)
    if SMOOTH:
        tl.store(partials + 3 * size, plain, mask=row < rows)


@triton.jit(do_not_specialize=["vocabulary", "parts", "size", "smoothing"])
def _linear_cross_entropy_join_kernel(
    partials,
    count,
    losses,
    stats,
    vocabulary,
    parts,
    size,
    smoothing,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    # stats [2, size]: the maximum and 1 / the sum of exponentials, kept apart, since the logarithm
    # of the sum is rounded by more than p may be; the rows that do not count lose nothing
    rows = tl.load(count)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, PARTS)
    at = partials + i[:, None].to(tl.int64) * 4 * size + row[None, :]
    mask = (i < parts)[:, None] & (row < rows)[None, :]
    tops = tl.load(at, mask=mask, other=-3.4e38)
    top = tl.max(tops, 0)
    exps = tl.sum(tl.load(at + size, mask=mask, other=0.0) * tl.exp(tops - top[None, :]), 0)
    hit = tl.sum(tl.load(at + 2 * size, mask=mask, other=0.0), 0)
    log = tl.log(exps)
    loss = log + (top - hit)
    if SMOOTH:
        plain = tl.sum(tl.load(at + 3 * size, mask=mask, other=0.0), 0)
        loss = log + (1.0 - smoothing) * (top - hit) + smoothing * (top - plain / vocabulary)
    tl.store(losses + row, tl.where(row < rows, loss, 0.0), mask=row < size)
    tl.store(stats + row, top, mask=row < rows)
    tl.store(stats + size + row, 1.0 / exps, mask=row < rows)


@triton.jit(do_not_specialize=["vocabulary", "first", "size", "smoothing"])
def _linear_cross_entropy_grad_kernel(
    x,
    weight,
    bias,
    target,
    count,
    scale,
    stats,
    grads,
    partials,
    vocabulary,
    first,
    size,
    smoothing,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # grads [size, COLUMNS], of the classes from `first`; zero past the last row or class
    rows = tl.load(count)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= rows:
        return
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = first + place
    logits = _logits(x, weight, bias, row, col, rows, vocabulary, C, BLOCK_K)
    goal = tl.load(target + row, mask=row < rows, other=-1)
    top = tl.load(stats + row, mask=row < rows, other=0.0)
    inverse = tl.load(stats + size + row, mask=row < rows, other=0.0)
    inside = (row < rows)[:, None] & (col < vocabulary)[None, :]
    probs = tl.where(inside, tl.exp(logits - top[:, None]) * inverse[:, None], 0.0)
    hits = tl.where(col[None, :] == goal[:, None], 1.0, 0.0)
    unit, spread, hit = tl.load(scale), smoothing / vocabulary, 1.0 - smoothing
    grad = tl.where(inside, (probs - spread - hit * hits) * unit, 0.0)
    at = grads + row.to(tl.int64)[:, None] * COLUMNS + place[None, :]
    tl.store(at, grad.to(grads.dtype.element_ty), mask=(row < size)[:, None])
    if partials is not None:
        partials += tl.program_id(0).to(tl.int64) * vocabulary + col
        # hits are counted apart: next to a 1 a sum of small numbers loses digits
        height = tl.minimum(rows - tl.program_id(0) * BLOCK_M, BLOCK_M)
        total = tl.sum(probs, 0) - spread * height - hit * tl.sum(hits, 0)
        tl.store(partials, total * unit, mask=col < vocabulary)


@triton.jit(do_not_specialize=["classes", "part", "size"])
def _linear_cross_entropy_dx_kernel(
    grads,
    weight,
    count,
    dx,
    classes,
    part,
    size,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dx [parts, size, C] += grads @ weight, each part over its own columns of grads
    rows = tl.load(count)
    if tl.program_id(0) * BLOCK_M >= rows:
        return
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.multiple_of(tl.program_id(2) * part, BLOCK_K)
    depth = tl.minimum(classes - first, part)
    grads += first
    weight += first.to(tl.int64) * C
    total = tile_product(
        grads, weight, row, col, rows, C, depth, COLUMNS, 1, C, 1, BLOCK_K, A_PADDED=True
    )
    at = tl.program_id(2).to(tl.int64) * size + row
    at = dx + at[:, None] * C + col[None, :]
    mask = (row < rows)[:, None] & (col < C)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["classes"])
def _linear_cross_entropy_dweight_kernel(
    grads,
    x,
    count,
    dweight,
    classes,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # dweight [classes, C] = gradsᵀ @ x
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(count)
    total = tile_product(grads, x, row, col, COLUMNS, C, rows, 1, COLUMNS, C, 1, BLOCK_K)
    at = dweight + row.to(tl.int64)[:, None] * C + col[None, :]
    mask = (row < classes)[:, None] & (col < C)[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "size"])
def _linear_cross_entropy_spread_kernel(
    parts_of_dx,
    order,
    count,
    dx,
    parts,
    size,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    # rows of dx: the parts added up, in the places that the rows came from
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    mask = (row < tl.load(count))[:, None] & (col < C)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    parts_of_dx += row.to(tl.int64)[:, None] * C + col[None, :]
    for _ in range(parts):
        total += tl.load(parts_of_dx, mask=mask, other=0.0)
        parts_of_dx += size.to(tl.int64) * C
    place = tl.load(order + row, mask=row < size, other=0).to(tl.int64)
    to = dx + place[:, None] * C + col[None, :]
    tl.store(to, total.to(dx.dtype.element_ty), mask=(row < size)[:, None] & (col < C)[None, :])


@triton.jit
def _linear_cross_entropy_bwd_kernel(grad, dloss, unit, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(dloss).to(tl.float32) * tl.load(unit)
    value = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


@dataclass
class _Problem:
    x: Tensor  # [N, C], the rows that count first
    weight: Tensor  # [V, C]
    bias: Tensor | None  # [V]
    target: Tensor  # [N], as x
    order: Tensor  # [N], where the rows of x came from
    count: Tensor  # int32, how many rows count
    smoothing: float


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """The losses by row, and the softmax's maximum and 1 / its sum."""
    x, vocabulary = problem.x, problem.weight.shape[0]
    (size, dim), tile = x.shape, largest_tile(x.dtype)
    down, across = tile.blocks(size, vocabulary)
    part = tile.n * triton.cdiv(across, min(triton.cdiv(2 * BUSY, down), across, _PARTS))
    parts = triton.cdiv(vocabulary, part)
    partials = torch.empty(parts, 4, size, dtype=torch.float32, device=x.device)
    stats = torch.empty(2, size, dtype=torch.float32, device=x.device)
    losses = torch.empty(size, dtype=torch.float32, device=x.device)
    smooth = problem.smoothing > 0
    _linear_cross_entropy_fwd_kernel[(down, parts)](
        x,
        problem.weight,
        problem.bias,
        problem.target,
        problem.count,
        partials,
        vocabulary,
        part,
        size,
        C=dim,
        SMOOTH=smooth,
        **tile.options(),
    )
    _linear_cross_entropy_join_kernel[(triton.cdiv(size, 32),)](
        partials,
        problem.count,
        losses,
        stats,
        vocabulary,
        parts,
        size,
        problem.smoothing,
        SMOOTH=smooth,
        ROWS=32,
        PARTS=triton.next_power_of_2(parts),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return losses, stats


def _columns(size: int, vocabulary: int, itemsize: int) -> int:
    """Of the scratch matrix; few different numbers, since kernels are compiled for each."""
    most = max(_SCRATCH_BYTES // (size * itemsize), _LEAST_COLUMNS)
    return min(1 << most.bit_length() - 1, triton.cdiv(vocabulary, 128) * 128)


def _backward(
    problem: _Problem,
    stats: Tensor,  # [2, N]
    scale: Tensor,  # scalar
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, times scale; those not needed are empty."""
    x, weight = problem.x, problem.weight
    (size, dim), vocabulary, tile = x.shape, weight.shape[0], largest_tile(x.dtype)
    columns = _columns(size, vocabulary, x.itemsize)
    (down, across), (_, wide) = tile.blocks(size, dim), tile.blocks(size, columns)
    parts = min(max(BUSY // (down * across), 1), _DX_PARTS, wide)
    part = triton.cdiv(columns, parts * tile.k) * tile.k
    floats: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    grads = torch.empty(size, columns, dtype=x.dtype, device=x.device)
    dx_parts = torch.zeros(parts, size if needs[0] else 0, dim, **floats)
    dweight = torch.empty(weight.shape if needs[1] else 0, dtype=dweight_dtype(x), device=x.device)
    partials = torch.zeros(1, down, vocabulary, **floats) if needs[2] else None
    for first in range(0, vocabulary, columns):
        classes = min(columns, vocabulary - first)
        _linear_cross_entropy_grad_kernel[(down, wide)](
            x,
            weight,
            problem.bias,
            problem.target,
            problem.count,
            scale,
            stats,
            grads,
            partials,
            vocabulary,
            first,
            size,
            problem.smoothing,
            C=dim,
            COLUMNS=columns,
            **tile.options(),
        )
        if needs[0]:
            _linear_cross_entropy_dx_kernel[(down, across, parts)](
                grads,
                weight[first:],
                problem.count,
                dx_parts,
                classes,
                part,
                size,
                C=dim,
                COLUMNS=columns,
                **tile.options(),
            )
        if needs[1]:
            _linear_cross_entropy_dweight_kernel[(triton.cdiv(classes, tile.m), across)](
                grads,
                x,
                problem.count,
                dweight[first:],
                classes,
                C=dim,
                COLUMNS=columns,
                **tile.options(),
            )
    dbias = torch.empty(0, **floats) if partials is None else sum_partials(partials)[0]
    return _spread(problem, dx_parts, needs[0]), dweight, dbias


def _spread(problem: _Problem, parts: Tensor, needed: bool) -> Tensor:
    """Dx from its parts [parts, N, C], in the order of the caller's rows."""
    size, dim = problem.x.shape
    dx = problem.x.new_empty((size, dim) if needed else 0)
    if needed:
        rows, columns, warps = row_tile(dim, 4096)
        _linear_cross_entropy_spread_kernel[(triton.cdiv(size, rows),)](
            parts,
            problem.order,
            problem.count,
            dx,
            len(parts),
            size,
            C=dim,
            ROWS=rows,
            COLS=columns,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the gradients of x, weight and bias divided by `unit`, and `unit`."""
    if x.shape[0] == 0:
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx, dbias = torch.empty_like(x), loss.new_zeros(weight.shape[0] if needs[2] else 0)
        shape = weight.shape if needs[1] else (0,)
        dweight = torch.zeros(shape, dtype=dweight_dtype(x), device=x.device)
        return loss, dx if needs[0] else x.new_empty(0), dweight, dbias, torch.ones_like(loss)
    ignored = target == ignore_index
    order = torch.argsort(ignored.to(torch.uint8), stable=True)
    count = (~ignored).sum(dtype=torch.int32)
    problem = _Problem(
        x.index_select(0, order),
        weight.contiguous(),
        contiguous(bias),
        target[order],
        order,
        count,
        label_smoothing,
    )
    losses, stats = _forward(problem)
    rows = count.clamp(min=1)
    loss = losses.sum(dtype=torch.float64)
    loss = (loss / rows if mean else loss).float()
    # 1 / rows, times a power of two that the caller divides by, exactly: the logits' gradient
    # keeps the range of p - y
    fraction = torch.frexp(rows.float())[0] if mean else torch.ones_like(loss)
    unit = fraction / rows if mean else torch.ones_like(loss)
    if not any(needs):
        empty = loss.new_empty(0)
        dweight = torch.empty(0, dtype=dweight_dtype(x), device=x.device)
        return loss, x.new_empty(0), dweight, empty, unit
    return loss, *_backward(problem, stats, 1 / fraction, needs), unit


def linear_cross_entropy_bwd(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times those of the loss, in x's dtype."""

    def scaled(grad: Tensor) -> Tensor:
        out = torch.empty_like(grad, dtype=dx.dtype)
        if grad.numel() > 0:
            _linear_cross_entropy_bwd_kernel[(triton.cdiv(grad.numel(), 2048),)](
                grad,
                dloss,
                unit,
                out,
                grad.numel(),
                BLOCK=2048,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return out

    return scaled(dx), scaled(dweight), scaled(dbias)
