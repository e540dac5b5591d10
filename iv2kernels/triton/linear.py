"""linear in Triton: one GEMM kernel for the outputs and for the gradients of x and weight.

One program for a tile of the result (iv2kernels/triton/gemm.py), with the bias added in float32
before it is rounded once. The three products differ in which operand lies transposed in memory: the
strides are constants, so that each compiles to its own loads of 16 bytes. Bound by the tensor
cores, or by the FMA units in float32.
The bias's gradient is a sum of torch's. On a GPU torch's own GEMM, which also adds the bias, is
preferred: there is nothing here that it leaves to fuse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.library.linear import as_rows
from iv2kernels.native.memory import contiguous
from iv2kernels.tiles import Knob, choose
from iv2kernels.triton.gemm import alternatives, grouped, tile_for, tile_product


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    a,
    b,
    bias,
    out,
    rows,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # a [M, K] @ b [K, N]; M or K, the one that is None, is `rows`
    height = rows if M is None else M
    depth = rows if K is None else K
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row, col = grouped(tl.program_id(0), tl.cdiv(height, BLOCK_M), across, 8)
    row = row * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tile_product(
        a,
        b,
        row,
        col,
        height,
        N,
        depth,
        A_ROW=1 if A_TRANSPOSED else K,
        A_DEPTH=M if A_TRANSPOSED else 1,
        B_DEPTH=1 if B_TRANSPOSED else N,
        B_COL=K if B_TRANSPOSED else 1,
        BLOCK_K=BLOCK_K,
    )
    if bias is not None:
        total += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * N + col[None, :]
    mask = (row < height)[:, None] & (col < N)[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


def _product(
    a: Tensor,  # [M, K], or [K, M] to be transposed
    b: Tensor,  # [K, N], or [N, K] to be transposed
    bias: Tensor | None,  # [N]
    a_transposed: bool,
    b_transposed: bool,
) -> Tensor:
    """A @ b + bias; the first axis of a is that of the rows, all others are widths."""
    (rows, width), cols = a.shape, b.shape[0 if b_transposed else 1]
    height = width if a_transposed else rows
    out = torch.empty(height, cols, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    knob = Knob("linear", cols, a.dtype)
    tile = choose(knob, tile_for(height, cols, a.dtype), alternatives(a.dtype))
    down, across = tile.blocks(height, cols)
    _linear_kernel[(down * across,)](
        a,
        b,
        bias,
        out,
        rows,
        M=width if a_transposed else None,
        N=cols,
        K=None if a_transposed else width,
        A_TRANSPOSED=a_transposed,
        B_TRANSPOSED=b_transposed,
        **tile.options(),
    )
    return out


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See iv2kernels/ops/linear.py."""
    rows, weight = as_rows(x).contiguous(), weight.contiguous()
    y = _product(rows, weight, contiguous(bias), False, True)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dy W, dyᵀ x and Σ dy; the ones not needed are empty."""
    dy2, dx, dweight, dbias = as_rows(dy).contiguous(), *(x.new_empty(0) for _ in range(3))
    if needs[0]:
        dx = _product(dy2, weight.contiguous(), None, False, False).view(x.shape)
    if needs[1]:
        dweight = _product(dy2, as_rows(x).contiguous(), None, True, False)
    if needs[2]:
        dbias = dy2.sum(0)
    return dx, dweight, dbias
