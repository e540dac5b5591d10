"""spatiotemporal_attention on csrc/cpu/spatiotemporal_attention.cpp and attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native import attention
from iv2kernels.native.memory import DTYPE, ptr


def _gain(q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """Scores see only the product of the two weights."""
    return (q_weight.float() * k_weight.float()).contiguous()


def spatiotemporal_attention_fwd(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: SpatiotemporalAttentionNormFwd, AttentionFwd."""
    batch, tokens, _, heads, head_dim = qkv.shape
    rstd, gain = torch.empty(2, batch, tokens), None
    if q_weight is not None and k_weight is not None:
        qkv, gain = qkv.contiguous(), _gain(q_weight, k_weight)
        if qkv.numel():
            _C.spatiotemporal_attention_norm_fwd(
                ptr(qkv),
                ptr(rstd),
                batch * tokens,
                heads * head_dim,
                DTYPE[qkv.dtype],
                float(eps),
                torch.get_num_threads(),
            )
    else:
        rstd = torch.empty(0)
    o, lse = attention.forward(
        *qkv.unbind(2),
        None,
        None,
        tokens,
        tokens,
        False,
        scale,
        gain,
        rstd if gain is not None else None,
    )
    return o.flatten(2), lse, rstd


def spatiotemporal_attention_bwd(
    d_o: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    o: Tensor,
    lse: Tensor,
    rstd: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AttentionBwd, SpatiotemporalAttentionNormBwd."""
    batch, tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    width = heads * head_dim
    normed = q_weight is not None and k_weight is not None
    dgain = torch.zeros(width if normed else 0)
    if qkv.numel() == 0:
        return dqkv, dgain, dgain.clone()
    gain = None
    if q_weight is not None and k_weight is not None:
        qkv, gain = qkv.contiguous(), _gain(q_weight, k_weight)
    dq, dk, dv = dqkv.unbind(2)
    partial, direct = attention.backward(
        d_o.unflatten(2, (heads, head_dim)),
        None,
        *qkv.unbind(2),
        o,
        lse,
        None,
        None,
        tokens,
        tokens,
        False,
        scale,
        None if normed else dq,
        None if normed else dk,
        dv,
        gain,
        rstd if normed else None,
    )
    if q_weight is None or k_weight is None or partial is None:
        return dqkv, dgain, dgain.clone()
    rows = batch * tokens
    scratch = torch.empty(_C.row_chunks(rows), width)
    _C.spatiotemporal_attention_norm_bwd(
        ptr(qkv),
        ptr(rstd),
        ptr(gain),
        ptr(partial),
        ptr(direct),
        ptr(dqkv),
        ptr(dgain),
        ptr(scratch),
        rows,
        width,
        partial.shape[0],
        DTYPE[qkv.dtype],
        torch.get_num_threads(),
    )
    return dqkv, dgain * k_weight.float(), dgain * q_weight.float()
