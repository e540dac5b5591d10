"""attention on csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, contiguous, ptr


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor, packed: bool) -> tuple[int, int, int]:
    """Of batch, token and head."""
    return (0, x.stride(0), x.stride(1)) if packed else (x.stride(0), x.stride(1), x.stride(2))


def _check_lengths(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(
            f"attention: {name} must run from 0 to {total}, got {starts[0]} to {starts[-1]}"
        )
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"attention: {name} must not decrease, got {starts}")
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"attention: max_seqlen of {name} must be at least {max(lengths)}, got {longest}"
        )


def _shape(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """The number of sequences, and their checked starts."""
    if cu_seqlens_q is None:
        return q.shape[0], None, None
    return (
        cu_seqlens_q.numel() - 1,
        contiguous(cu_seqlens_q),
        contiguous(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k),
    )


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: AttentionFwd."""
    if cu_seqlens_q is not None:
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        _check_lengths("cu_seqlens_k", cu_k, k.shape[0], max_seqlen_k)
    return forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    q_gain: Tensor | None = None,
    rstd: Tensor | None = None,  # [2, B * N]
) -> tuple[Tensor, Tensor]:
    """attention_fwd without the checks, and with the norm of spatiotemporal_attention."""
    packed = cu_seqlens_q is not None
    sequences, cu_q, cu_k = _shape(q, k, cu_seqlens_q, cu_seqlens_k)
    q, k, v = _strided(q), _strided(k), _strided(v)
    heads, head_dim = q.shape[-2:]
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1]))
    if o.numel() == 0:
        return o, lse
    if k.numel() == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, _C.attention_fwd_scratch(head_dim, max_seqlen_k))
    _C.attention_fwd(
        ptr(q),
        ptr(k),
        ptr(v),
        ptr(cu_q),
        ptr(cu_k),
        ptr(q_gain),
        0 if rstd is None else ptr(rstd[0]),
        0 if rstd is None else ptr(rstd[1]),
        ptr(o),
        ptr(lse),
        ptr(scratch),
        sequences,
        heads,
        k.shape[-2],
        max_seqlen_q,
        max_seqlen_k,
        head_dim,
        o.numel() // (heads * head_dim),
        *_strides(q, packed),
        *_strides(k, packed),
        *_strides(v, packed),
        DTYPE[q.dtype],
        causal,
        float(scale),
        threads,
    )
    return o, lse


def attention_bwd(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AttentionBwd."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    backward(
        d_o,
        dlse,
        q,
        k,
        v,
        o,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        scale,
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


def backward(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor,
    q_gain: Tensor | None = None,
    rstd: Tensor | None = None,  # [2, B * N]
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dq, dk and dv: rows of tokens, a row contiguous.

    With dq and dk None returns what the norm's backward needs: dq_partial and dk_direct.
    """
    packed = cu_seqlens_q is not None
    sequences, cu_q, cu_k = _shape(q, k, cu_seqlens_q, cu_seqlens_k)
    q, k, v = _strided(q), _strided(k), _strided(v)
    d_o, dlse = d_o.contiguous(), contiguous(dlse)
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    queries, keys = o.numel() // (heads * head_dim), k.numel() // (kv_heads * head_dim)
    threads = torch.get_num_threads()
    chunks = _C.attention_key_chunks(sequences, kv_heads, max_seqlen_k)
    partial = None if dq is not None and chunks == 1 else torch.empty(chunks, queries, heads, head_dim)
    direct = None if dk is not None else torch.empty(keys, kv_heads, head_dim)
    size = _C.attention_bwd_scratch(head_dim, max_seqlen_q, max_seqlen_k, heads // kv_heads)
    scratch = torch.empty(threads, size)
    _C.attention_bwd(
        ptr(q),
        ptr(k),
        ptr(v),
        ptr(cu_q),
        ptr(cu_k),
        ptr(q_gain),
        0 if rstd is None else ptr(rstd[0]),
        0 if rstd is None else ptr(rstd[1]),
        ptr(o),
        ptr(d_o),
        ptr(lse),
        ptr(dlse),
        ptr(dq),
        ptr(dk),
        ptr(dv),
        ptr(partial),
        ptr(direct),
        ptr(scratch),
        sequences,
        heads,
        kv_heads,
        max_seqlen_q,
        max_seqlen_k,
        head_dim,
        queries,
        *_strides(q, packed),
        *_strides(k, packed),
        *_strides(v, packed),
        0 if dq is None else dq.stride(-3),
        dv.stride(-3),
        chunks,
        DTYPE[q.dtype],
        causal,
        float(scale),
        threads,
    )
    return partial, direct
