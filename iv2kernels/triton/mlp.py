"""mlp in Triton: GELU, its derivative and the first bias's gradient, inside the GEMMs next to them.

Halves: the GEMM that gives z (iv2kernels/triton/gemm.py) adds the bias and stores z and gelu(z) of
its tile; on the way back the one that gives the gradient of gelu(z) reads z, and stores the
gradient of z, gelu(z) again for the second weight's gradient, and the sum of the tile's rows for
the bias. That spares reading z once, and writing and reading a gradient. Bound by the tensor cores.
The other four GEMMs have nothing to fuse and are torch's. So are all of float32, whose precision is
the user's choice there (torch.set_float32_matmul_precision); GELU is then a pass of its own, bound
by memory, in backward over chunks of rows (``common.row_chunks``), the serial axis.
Sums over rows are of fixed parts, added up by ``common.sum_partials``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from iv2kernels.library.linear import as_rows
from iv2kernels.triton.common import row_chunks, sum_partials
from iv2kernels.triton.gemm import grouped, tile_for, tile_product


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    """gelu(z) and its derivative; both forms are z times a distribution function."""
    if TANH:
        # 0.5 (1 + tanh u) = 1 / (1 + e^-2u) with u = sqrt(2/pi) (z + 0.044715 z^3)
        near = tl.minimum(tl.maximum(z, -10.0), 10.0)  # beyond, the exponential would overflow
        squared = near * near
        e = tl.exp(-1.5957691216057308 * near * (1.0 + 0.044715 * squared))
        cdf = 1.0 / (1.0 + e)
        slope = cdf * (cdf * e) * (1.5957691216057308 + 0.2140644488178107 * squared)
    else:
        near = z
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return z * cdf, cdf + near * slope


@triton.jit(do_not_specialize=["rows"])
def _mlp_fwd_kernel(
    x,
    weight,
    bias,
    z,
    a,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row, col = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), across, 8)
    row = row * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tile_product(x, weight, row, col, rows, N, K, K, 1, 1, K, BLOCK_K)
    total += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    mask = (row < rows)[:, None] & (col < N)[None, :]
    stored = total.to(a.dtype.element_ty)
    if z is not None:
        tl.store(z + at, stored, mask=mask)
    value, _ = _gelu(stored.to(tl.float32), TANH)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _mlp_bwd_kernel(
    dy,
    weight,
    z,
    a,
    dz,
    partials,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    down, col = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), across, 8)
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    col = col * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = tile_product(dy, weight, row, col, rows, N, K, K, 1, N, 1, BLOCK_K)
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    mask = (row < rows)[:, None] & (col < N)[None, :]
    # z is read twice, the second time from a cache: both results at once would not fit registers
    if a is not None:
        value, _ = _gelu(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), TANH)
        tl.store(a + at, value.to(a.dtype.element_ty), mask=mask)
    _, derivative = _gelu(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), TANH)
    grad *= derivative
    tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=mask)
    tl.store(partials + down.to(tl.int64) * N + col, tl.sum(grad, 0), mask=col < N)


@triton.jit
def _mlp_gelu_fwd_kernel(z, a, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value, _ = _gelu(tl.load(z + at, mask=at < count, other=0.0).to(tl.float32), TANH)
    tl.store(a + at, value.to(a.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _mlp_gelu_bwd_kernel(
    da,
    z,
    a,
    dz,
    partials,
    rows,
    chunk,
    N: tl.constexpr,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(0, chunk, ROWS, num_stages=2):
        row = tl.program_id(0) * chunk + start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        mask = (row < rows)[:, None] & (col < N)[None, :]
        value, derivative = _gelu(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), TANH)
        grad = tl.load(da + at, mask=mask, other=0.0).to(tl.float32) * derivative
        if a is not None:
            tl.store(a + at, value.to(a.dtype.element_ty), mask=mask)
        tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=mask)
        total += grad
    partials += tl.program_id(0).to(tl.int64) * N + col
    tl.store(partials, tl.sum(total, 0), mask=col < N)


def mlp_fwd(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    approximate: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/mlp.py. The second result is z, empty unless it is to be saved."""
    rows, tanh = as_rows(x).contiguous(), approximate == "tanh"
    (count, width), hidden = rows.shape, fc1_weight.shape[0]
    fused = x.dtype != torch.float32
    if fused:
        a = x.new_empty(count, hidden)
        z = torch.empty_like(a) if save else None
    else:
        z = F.linear(rows, fc1_weight, fc1_bias)
        a = torch.empty_like(z) if save else z
    if a.numel() > 0 and fused:
        tile = tile_for(count, hidden, x.dtype)
        down, across = tile.blocks(count, hidden)
        _mlp_fwd_kernel[(down * across,)](
            rows,
            fc1_weight.contiguous(),
            fc1_bias.contiguous(),
            z,
            a,
            count,
            N=hidden,
            K=width,
            TANH=tanh,
            **tile.options(),
        )
    elif a.numel() > 0:
        _mlp_gelu_fwd_kernel[(triton.cdiv(a.numel(), 1024),)](
            z, a, a.numel(), TANH=tanh, BLOCK=1024, num_warps=4, enable_fp_fusion=True
        )
    y = F.linear(a, fc2_weight, fc2_bias).view(*x.shape[:-1], fc2_weight.shape[0])
    return y, z if save and z is not None else x.new_empty(0)


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    approximate: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x and of the weights and biases; the ones not needed are empty."""
    dy, rows = as_rows(dy).contiguous(), as_rows(x)
    grads = [x.new_empty(0) for _ in needs]
    if needs[4]:
        grads[4] = dy.sum(0)
    if any(needs[:4]):
        a = torch.empty_like(z) if needs[3] else None
        dz, dbias = _hidden_grad(dy, z, a, fc2_weight, approximate == "tanh")
        if needs[0]:
            grads[0] = torch.mm(dz, fc1_weight).view(x.shape)
        if needs[1]:
            grads[1] = torch.mm(dz.t(), rows)
        if needs[2]:
            grads[2] = dbias.to(x.dtype)
        if a is not None:
            grads[3] = torch.mm(dy.t(), a)
    return tuple(grads)


def _hidden_grad(
    dy: Tensor,  # [M, C_out]
    z: Tensor,  # [M, H]
    a: Tensor | None,  # [M, H], to be filled with gelu(z)
    weight: Tensor,  # [C_out, H]
    tanh: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of z, and its float32 sum over the rows."""
    rows, hidden = z.shape
    fused = z.dtype != torch.float32
    dz = torch.empty_like(z) if fused else torch.mm(dy, weight)
    if z.numel() == 0:
        return dz, torch.zeros(hidden, dtype=torch.float32, device=z.device)
    tile = tile_for(rows, hidden, z.dtype)
    down, across = tile.blocks(rows, hidden)
    chunk, chunks = row_chunks(rows, 16)
    partials = torch.empty(
        1, down if fused else chunks, hidden, dtype=torch.float32, device=z.device
    )
    if fused:
        _mlp_bwd_kernel[(down * across,)](
            dy,
            weight.contiguous(),
            z,
            a,
            dz,
            partials,
            rows,
            N=hidden,
            K=dy.shape[1],
            TANH=tanh,
            **tile.options(),
        )
    else:
        _mlp_gelu_bwd_kernel[(chunks, triton.cdiv(hidden, 128))](
            dz,
            z,
            a,
            dz,
            partials,
            rows,
            chunk,
            N=hidden,
            TANH=tanh,
            ROWS=16,
            COLS=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    (dbias,) = sum_partials(partials)
    return dz, dbias
