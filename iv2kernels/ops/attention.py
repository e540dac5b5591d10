"""Softmax attention: dense over strided views, or packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl


from dataclasses import dataclass


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]."""

    cu_seqlens_q: Tensor  # [S + 1] int32
    max_seqlen_q: int
    cu_seqlens_k: Tensor | None = None  # [S + 1] int32; None: the same as q
    max_seqlen_k: int | None = None


def attention(q, k, v, *, causal=False, scale=None, packed=None, return_lse=False, impl=None):
    name = dispatch.choose("attention", q, impl)
    o, lse = reference(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale, packed)
    return (o, lse) if return_lse else o


def reference(q, k, v, causal, scale, packed):
    """The definition."""
    if packed is not None:
        cu_q = packed.cu_seqlens_q.tolist()
        cu_k = cu_q if packed.cu_seqlens_k is None else packed.cu_seqlens_k.tolist()
        parts = [
            reference(q[a:b][None], k[c:d][None], v[c:d][None], causal, scale, None)
            for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:])
        ]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if causal:
        nq, nk = s.shape[-2:]
        s = s.masked_fill(~torch.ones(nq, nk, dtype=torch.bool, device=s.device).tril(nk - nq), -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v), lse
