"""attention_pool in Triton: few queries a sample, over layer-normalised tokens never stored.

As on the CPU, what depends on a token and a head (logits, p, their gradients) is kept as
[B, N, lanes], and there are three products, each with its own kernel:
  project: a block of tokens times all heads, over the width, the serial axis. Forward it finds the
           statistics on the way: tokens are centred at the mean of their first columns, which is
           close enough to their mean to lose no digits, and the rest is corrected afterwards;
  weigh:   a block of columns for all heads, over all tokens of a sample, the serial axis;
  spread:  a block of tokens, over the width, ending in LayerNorm's backward, whose two means follow
           from what project has found.
Between project and weigh a small kernel joins the softmax of the blocks of tokens.
All is float32: each factor is split into three bfloat16 numbers, and the six products that matter
go through the tensor cores, for a value 12 multiplications a head forward and 24 backward.
Bound by memory: x is read twice forward, three times backward, mostly from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pieces(x):
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(a, b):
    """A @ b to float32's precision; short sums, since tensor cores round them towards zero."""
    a_high, a_middle, a_low = _pieces(a)
    b_high, b_middle, b_low = _pieces(b)
    small = tl.dot(a_low, b_high)
    small = tl.dot(a_high, b_low, small)
    small = tl.dot(a_middle, b_middle, small)
    small = tl.dot(a_middle, b_high, small)
    small = tl.dot(a_high, b_middle, small)
    return tl.dot(a_high, b_high) + small


@triton.jit
def _tile(matrix, row, col, rows, C: tl.constexpr):
    """Float32 tile of a matrix [rows, C] with zeros around it."""
    at = matrix + row.to(tl.int64)[:, None] * C + col[None, :]
    mask = (row < rows)[:, None] & (col < C)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "eps"])
def _attention_pool_project_kernel(
    x,
    matrix,
    mean,
    rstd,
    out,
    p,
    partials,
    tokens,
    eps,
    FORWARD: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # out [B, N, lanes] = xhat . matrix [B, heads, C]. Forward: mean and rstd are written, and
    # partials [B, blocks, 2, lanes] get maximum and sum of exponentials over the block's tokens;
    # backward: the sum of p out
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_C)
    head = tl.arange(0, BLOCK_H)
    mean += sample * tokens
    rstd += sample * tokens
    x += sample * tokens * C
    matrix += sample * HEADS * C
    if FORWARD:
        shift = tl.sum(_tile(x, row, col, tokens, C), 1) / (C if C < BLOCK_C else BLOCK_C)
    else:
        shift = tl.load(mean + row, mask=row < tokens, other=0.0)
    total = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    of_heads = tl.zeros([BLOCK_H], tl.float32)
    plain = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        centred = _tile(x, row, start + col, tokens, C) - shift[:, None]
        centred = tl.where((start + col < C)[None, :], centred, 0.0)
        query = _tile(matrix, head, start + col, HEADS, C)
        total += _product(centred, tl.trans(query))
        if FORWARD:
            of_heads += tl.sum(query, 1)
            plain += tl.sum(centred, 1)
            squares += tl.sum(centred * centred, 1)
    if FORWARD:
        beyond = plain / C  # of the mean, from the shift
        inverse = tl.rsqrt(tl.maximum(squares / C - beyond * beyond, 0.0) + eps)
        total -= beyond[:, None] * of_heads[None, :]
        tl.store(mean + row, shift + beyond, mask=row < tokens)
        tl.store(rstd + row, inverse, mask=row < tokens)
    else:
        inverse = tl.load(rstd + row, mask=row < tokens, other=0.0)
    total *= inverse[:, None]
    at = (sample * tokens + row)[:, None] * LANES + head[None, :]
    mask = (row < tokens)[:, None] & (head < LANES)[None, :]
    tl.store(out + at, total, mask=mask)
    block = sample * tl.num_programs(0) + tl.program_id(0)
    if FORWARD:
        partials += block * 2 * LANES + head
        total = tl.where(mask, total, float("-inf"))
        top = tl.max(total, 0)
        exps = tl.sum(tl.exp(total - tl.where(head < LANES, top, 0.0)[None, :]), 0)
        tl.store(partials, top, mask=head < LANES)
        tl.store(partials + LANES, exps, mask=head < LANES)
    else:
        weighed = tl.load(p + at, mask=mask, other=0.0) * total
        tl.store(partials + block * LANES + head, tl.sum(weighed, 0), mask=head < LANES)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _attention_pool_softmax_kernel(
    logits,
    partials,
    p,
    probs,
    tokens,
    blocks,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # p, [B, N, lanes], and its mean over the heads; every program joins the blocks again
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.arange(0, BLOCK_H)
    top = tl.full([BLOCK_H], -3.4e38, tl.float32)
    exps = tl.zeros([BLOCK_H], tl.float32)
    partials += sample * blocks * 2 * LANES + head
    for _ in range(blocks):
        found = tl.load(partials, mask=head < LANES, other=0.0)
        above = tl.maximum(top, found)
        exps *= tl.exp(top - above)
        exps += tl.load(partials + LANES, mask=head < LANES, other=1.0) * tl.exp(found - above)
        top = above
        partials += 2 * LANES
    at = (sample * tokens + row)[:, None] * LANES + head[None, :]
    mask = (row < tokens)[:, None] & (head < LANES)[None, :]
    value = tl.exp(tl.load(logits + at, mask=mask, other=0.0) - top[None, :]) / exps[None, :]
    tl.store(p + at, value, mask=mask)
    mean = tl.sum(tl.where((head < HEADS)[None, :], value, 0.0), 1) / HEADS
    tl.store(probs + sample * tokens + row, mean, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _attention_pool_weigh_kernel(
    x,
    weights,
    mean,
    rstd,
    out,
    tokens,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # out [B, heads, C] = the sum over the tokens of weights [B, N, lanes] times xhat
    sample = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    head = tl.arange(0, BLOCK_H)
    x += sample * tokens * C
    weights += sample * tokens * LANES
    total = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        at = sample * tokens + row
        centre = tl.load(mean + at, mask=row < tokens, other=0.0)
        inverse = tl.load(rstd + at, mask=row < tokens, other=0.0)
        centred = _tile(x, row, col, tokens, C) - centre[:, None]
        weight = _tile(weights, row, head, tokens, LANES) * inverse[:, None]
        total += _product(tl.trans(centred), weight)
    to = out + (sample * HEADS + head)[None, :] * C + col[:, None]
    mask = (head < HEADS)[None, :] & (col < C)[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _attention_pool_spread_kernel(
    x,
    query,
    dz,
    sums,
    mean,
    rstd,
    logits,
    p,
    dp,
    partials,
    dlogits,
    dx,
    tokens,
    blocks,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # with g = the sum over heads of p dz + dlogits query:
    # dx = rstd (g - mean(g) - xhat mean(g xhat)); sums [B, heads, 2] are of rows of dz and query
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.arange(0, BLOCK_H)
    delta = tl.zeros([BLOCK_H], tl.float32)
    partials += sample * blocks * LANES + head
    for _ in range(blocks):
        delta += tl.load(partials, mask=head < LANES, other=0.0)
        partials += LANES
    at = (sample * tokens + row)[:, None] * LANES + head[None, :]
    mask = (row < tokens)[:, None] & (head < HEADS)[None, :]
    weight = tl.load(p + at, mask=mask, other=0.0)
    upper = tl.load(dp + at, mask=mask, other=0.0)
    grad = weight * (upper - delta[None, :])
    tl.store(dlogits + at, grad, mask=(row < tokens)[:, None] & (head < LANES)[None, :])
    if dx is not None:
        sums += (sample * HEADS + head) * 2
        of_dz = tl.load(sums, mask=head < HEADS, other=0.0)
        of_query = tl.load(sums + 1, mask=head < HEADS, other=0.0)
        along = weight * upper + grad * tl.load(logits + at, mask=mask, other=0.0)
        along = tl.sum(along, 1) / C
        plain = tl.sum(weight * of_dz[None, :] + grad * of_query[None, :], 1) / C
        place = sample * tokens + row
        centre = tl.load(mean + place, mask=row < tokens, other=0.0)
        inverse = tl.load(rstd + place, mask=row < tokens, other=0.0)
        x += sample * tokens * C
        dz += sample * HEADS * C
        query += sample * HEADS * C
        for start in range(0, C, BLOCK_C):
            col = start + tl.arange(0, BLOCK_C)
            total = _product(weight, _tile(dz, head, col, HEADS, C))
            total += _product(grad, _tile(query, head, col, HEADS, C))
            xhat = (_tile(x, row, col, tokens, C) - centre[:, None]) * inverse[:, None]
            total = (total - plain[:, None] - xhat * along[:, None]) * inverse[:, None]
            to = dx + place[:, None] * C + col[None, :]
            inside = (row < tokens)[:, None] & (col < C)[None, :]
            tl.store(to, total.to(dx.dtype.element_ty), mask=inside)


# Tokens of a block, and columns of a tile.
_BLOCK_N, _BLOCK_C = 64, 64


def _constants(heads: int, lanes: int, dim: int) -> dict[str, int | bool]:
    return {
        "HEADS": heads,
        "LANES": lanes,
        "C": dim,
        "BLOCK_N": _BLOCK_N,
        "BLOCK_C": _BLOCK_C,
        "BLOCK_H": triton.next_power_of_2(lanes),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def attention_pool_fwd(
    x: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See iv2kernels/ops/attention_pool.py. Returns z, probs, (mean, rstd), logits and p."""
    (batch, tokens, dim), heads = x.shape, query.shape[1]
    lanes = (heads + 15) // 16 * 16
    x, query = x.contiguous(), query.float().contiguous()

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    z, probs = torch.empty(query.shape, dtype=x.dtype, device=x.device), floats(batch, tokens)
    stats, logits, p = (
        floats(2, batch, tokens),
        floats(batch, tokens, lanes),
        floats(batch, tokens, lanes),
    )
    if x.numel() == 0 or query.numel() == 0:
        return z.zero_(), probs.zero_(), stats, logits, p
    blocks, constants = triton.cdiv(tokens, _BLOCK_N), _constants(heads, lanes, dim)
    partials = floats(batch, blocks, 2, lanes)
    _attention_pool_project_kernel[(blocks, batch)](
        x, query, *stats, logits, None, partials, tokens, eps, FORWARD=True, **constants
    )
    _attention_pool_softmax_kernel[(blocks, batch)](
        logits,
        partials,
        p,
        probs,
        tokens,
        blocks,
        **{name: value for name, value in constants.items() if name not in ("C", "BLOCK_C")},
    )
    _attention_pool_weigh_kernel[(triton.cdiv(dim, _BLOCK_C), batch)](
        x, p, *stats, z, tokens, **constants
    )
    return z, probs, stats, logits, p


def attention_pool_bwd(
    dz: Tensor,
    x: Tensor,
    query: Tensor,
    stats: Tensor,
    logits: Tensor,
    p: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of x and query; those not needed are empty."""
    (batch, tokens, dim), heads, lanes = x.shape, query.shape[1], logits.shape[2]
    x, query, dz = x.contiguous(), query.float().contiguous(), dz.float().contiguous()
    dx = torch.empty(x.shape if needs[0] else 0, dtype=x.dtype, device=x.device)
    dquery = torch.empty(query.shape if needs[1] else 0, dtype=query.dtype, device=x.device)
    if x.numel() == 0 or query.numel() == 0:
        return dx.zero_(), dquery.zero_()
    if not any(needs):
        return dx, dquery
    blocks, constants = triton.cdiv(tokens, _BLOCK_N), _constants(heads, lanes, dim)
    dp, dlogits = torch.empty_like(p), torch.empty_like(p)
    partials = torch.empty(batch, blocks, lanes, dtype=torch.float32, device=x.device)
    _attention_pool_project_kernel[(blocks, batch)](
        x, dz, *stats, dp, p, partials, tokens, 0.0, FORWARD=False, **constants
    )
    _attention_pool_spread_kernel[(blocks, batch)](
        x,
        query,
        dz,
        torch.stack([dz.sum(2), query.sum(2)], 2) if needs[0] else None,
        *stats,
        logits,
        p,
        dp,
        partials,
        dlogits,
        dx if needs[0] else None,
        tokens,
        blocks,
        # with 4, float32's pieces of both products do not fit in registers
        **constants | {"num_warps": 8},
    )
    if needs[1]:
        _attention_pool_weigh_kernel[(triton.cdiv(dim, _BLOCK_C), batch)](
            x, dlogits, *stats, dquery, tokens, **constants
        )
    return dx, dquery
