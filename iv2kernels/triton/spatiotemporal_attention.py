"""spatiotemporal_attention in Triton: the kernels of attention.py, and two passes for the norms.

Forward: the norm kernel reads q and k once and stores one rstd a token; attention folds them into
its tiles, so that no normed tensor is stored. Backward: attention leaves in dqkv the gradient X of
q * rstd * gain, and of k at fixed rstd; the second kernel turns them, in place, into
  dx = X' - x * rstd**2 / C * sum_C(x X'),  with X' = rstd * gain * X for q and X for k,
and sums rstd * q * X over the tokens of a chunk, the serial axis: the gradient of gain, in partial
rows. Both walk over tiles of whole rows, all heads together, and are bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.triton import attention
from iv2kernels.triton.attention import Norm, Options
from iv2kernels.triton.attention_blocks import lists_of, lists_of_backward
from iv2kernels.triton.attention_tiles import tiles_for
from iv2kernels.triton.common import row_chunks, row_tile, sum_partials


@triton.jit(do_not_specialize=["rows"])
def _spatiotemporal_attention_norm_fwd_kernel(
    qkv, rstd, rows, eps, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at = row.to(tl.int64)[:, None] * (3 * C) + (tl.program_id(1) * C + col)[None, :]
    mask = (row < rows)[:, None] & (col < C)[None, :]
    x = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(rstd + tl.program_id(1).to(tl.int64) * rows + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _spatiotemporal_attention_norm_bwd_kernel(
    qkv,
    rstd,
    gain,
    dqkv,
    partials,
    rows,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # program_id(1) is 0 for q and 1 for k
    col = tl.arange(0, COLS)
    of_q = tl.program_id(1) == 0
    weight = tl.where(of_q, tl.load(gain + col, mask=col < C, other=1.0), 1.0)
    rstd += tl.program_id(1).to(tl.int64) * rows
    first = tl.program_id(0) * chunk
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(0, chunk, ROWS, num_stages=STAGES):
        row = first + start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * (3 * C) + (tl.program_id(1) * C + col)[None, :]
        mask = (row < rows)[:, None] & (col < C)[None, :]
        x = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dqkv + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        grad *= tl.where(of_q, inverse, 1.0)[:, None]
        sums += x * grad
        grad *= weight[None, :]
        mean = tl.sum(x * grad, 1) * inverse * inverse / C
        grad -= x * mean[:, None]
        tl.store(dqkv + at, grad.to(dqkv.dtype.element_ty), mask=mask)
    if of_q:
        partials += tl.program_id(0).to(tl.int64) * C
        tl.store(partials + col, tl.sum(sums, 0), mask=col < C)


def _norm(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, rstd: Tensor
) -> Norm | None:
    """Scores see only the product of the two weights."""
    if q_weight is None or k_weight is None:
        return None
    return Norm((q_weight.float() * k_weight.float()).contiguous(), rstd)


def _rstd(qkv: Tensor, eps: float) -> Tensor:
    batch, tokens, _, heads, head_dim = qkv.shape
    rstd = torch.empty(2, batch, tokens, dtype=torch.float32, device=qkv.device)
    if qkv.numel():
        rows, dim = batch * tokens, heads * head_dim
        tile_rows, columns, warps = row_tile(dim, 4096)
        _spatiotemporal_attention_norm_fwd_kernel[(triton.cdiv(rows, tile_rows), 2)](
            qkv,
            rstd,
            rows,
            eps,
            C=dim,
            ROWS=tile_rows,
            COLS=columns,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return rstd


def spatiotemporal_attention_fwd(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    lists: list[Tensor],
    pairs: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See iv2kernels/ops/spatiotemporal_attention.py."""
    rstd = torch.empty(0, dtype=torch.float32, device=qkv.device)
    if q_weight is not None and k_weight is not None:
        qkv = qkv.contiguous()
        rstd = _rstd(qkv, eps)
    q, k, v = qkv.unbind(2)
    tokens = q.shape[1]
    options = Options(None, None, tokens, tokens, False, scale)
    tiles = tiles_for(q.shape[-1], q.dtype)
    seen = lists_of(lists[0], lists[1], tiles, q.device) if lists else None
    norm = _norm(qkv, q_weight, k_weight, rstd)
    o, lse = attention.forward(q, k, v, options, seen, norm)
    return o.flatten(2), lse, rstd


def spatiotemporal_attention_bwd(
    d_o: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    o: Tensor,
    lse: Tensor,
    rstd: Tensor,
    lists: list[Tensor],
    pairs: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv and, in float32, of the weights (empty without them)."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dgain = torch.zeros(
        0 if q_weight is None else q_weight.shape[0], dtype=torch.float32, device=qkv.device
    )
    norm = _norm(qkv, q_weight, k_weight, rstd)
    if qkv.numel():
        qkv = qkv if norm is None else qkv.contiguous()
        q, k, v = qkv.unbind(2)
        dq, dk, dv = dqkv.unbind(2)
        options = Options(None, None, q.shape[1], q.shape[1], False, scale)
        tiles = tiles_for(q.shape[-1], q.dtype)
        seen = lists_of_backward(lists[0], lists[1], tiles, q.device) if lists else None
        attention.backward((d_o, None), (q, k, v, o, lse), (dq, dk, dv), options, seen, norm)
        if norm is not None:
            dgain = _norm_bwd(qkv, norm, dqkv)
    if q_weight is None or k_weight is None:
        return dqkv, dgain, torch.empty_like(dgain)
    return dqkv, dgain * k_weight.float(), dgain * q_weight.float()


def _norm_bwd(qkv: Tensor, norm: Norm, dqkv: Tensor) -> Tensor:
    """Completes dqkv, and returns the gradient of gain."""
    rows, dim = norm.rstd[0].numel(), norm.gain.numel()
    # what a step keeps ahead is twice as large in float32
    tile_rows, columns, warps = row_tile(dim, 4096 // qkv.itemsize)
    chunk, chunks = row_chunks(rows, tile_rows)
    partials = torch.empty(1, chunks, dim, dtype=torch.float32, device=qkv.device)
    _spatiotemporal_attention_norm_bwd_kernel[(chunks, 2)](
        qkv,
        norm.rstd,
        norm.gain,
        dqkv,
        partials,
        rows,
        chunk,
        C=dim,
        ROWS=tile_rows,
        COLS=columns,
        STAGES=2,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return sum_partials(partials)[0]
