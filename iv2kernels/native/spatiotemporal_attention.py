"""spatiotemporal_attention on csrc/cpu/spatiotemporal_attention.cpp and attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native import attention
from iv2kernels.native.attention import Norm, Options, threads_for
from iv2kernels.native.attention_blocks import lists_of
from iv2kernels.native.memory import DTYPE, ptr


def _gain(q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """Scores see only the product of the two weights."""
    return (q_weight.float() * k_weight.float()).contiguous()


def _options(tokens: int, scale: float, lists: list[Tensor], pairs: int, size: int) -> Options:
    """Lists: none, or blocks and runs of BlockMask."""
    seen = lists_of(lists[0], lists[1], pairs, size) if lists else None
    return Options(None, None, tokens, tokens, False, scale, seen)


def _rstd(qkv: Tensor, eps: float) -> Tensor:
    """See csrc/kernels.h: SpatiotemporalAttentionNormFwd."""
    batch, tokens, _, heads, head_dim = qkv.shape
    rstd = torch.empty(2, batch, tokens)
    if qkv.numel():
        _C.spatiotemporal_attention_norm_fwd(
            ptr(qkv),
            ptr(rstd),
            batch * tokens,
            heads * head_dim,
            DTYPE[qkv.dtype],
            float(eps),
            threads_for(32 * qkv.numel()),
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
    """See csrc/kernels.h: AttentionFwd."""
    rstd, norm = torch.empty(0), None
    if q_weight is not None and k_weight is not None:
        qkv = qkv.contiguous()
        rstd = _rstd(qkv, eps)
        norm = Norm(_gain(q_weight, k_weight), rstd)
    q, k, v = qkv.unbind(2)
    options = _options(q.shape[1], scale, lists, pairs, _C.attention_queries)
    o, lse = attention.forward(q, k, v, options, norm)
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
    """See csrc/kernels.h: AttentionBwd, SpatiotemporalAttentionNormBwd."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    options = _options(qkv.shape[1], scale, lists, pairs, _C.attention_block)
    grads = (d_o, None)
    if q_weight is None or k_weight is None:
        if qkv.numel():
            q, k, v = qkv.unbind(2)
            dq, dk, dv = dqkv.unbind(2)
            attention.backward(grads, (q, k, v, o, lse), (dq, dk, dv), options)
        return dqkv, torch.empty(0), torch.empty(0)
    dgain = torch.zeros(q_weight.shape)
    if qkv.numel():
        qkv = qkv.contiguous()
        q, k, v = qkv.unbind(2)
        norm = Norm(_gain(q_weight, k_weight), rstd)
        sums = attention.backward(
            grads, (q, k, v, o, lse), (None, None, dqkv[:, :, 2]), options, norm
        )
        _norm_bwd(qkv, norm, sums, dqkv, dgain)
    return dqkv, dgain * k_weight.float(), dgain * q_weight.float()


def _norm_bwd(
    qkv: Tensor,
    norm: Norm,
    sums: tuple[Tensor | None, Tensor | None],
    dqkv: Tensor,
    dgain: Tensor,
) -> None:
    """See csrc/kernels.h: SpatiotemporalAttentionNormBwd."""
    partial, direct = sums
    assert partial is not None
    rows, width = norm.rstd[0].numel(), dgain.numel()
    scratch = torch.empty(_C.row_chunks(rows), width)
    _C.spatiotemporal_attention_norm_bwd(
        ptr(qkv),
        ptr(norm.rstd),
        ptr(norm.gain),
        ptr(partial),
        ptr(direct),
        ptr(dqkv),
        ptr(dgain),
        ptr(scratch),
        rows,
        width,
        partial.shape[0],
        DTYPE[qkv.dtype],
        threads_for(32 * qkv.numel()),
    )
