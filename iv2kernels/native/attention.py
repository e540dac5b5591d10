"""attention on csrc/cpu/attention.cpp, and csrc/cuda/attention.cu and attention_bwd.cu."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, contiguous, on_cuda, place, ptr


class Lists(NamedTuple):
    """What each tile sees; see csrc/kernels.h: AttentionFwd."""

    tiles: Tensor  # [num_tiles, 4] int32
    runs: Tensor  # [R, 2] int32
    pairs: int  # of a query and a key it sees


class Options(NamedTuple):
    """What the op takes besides tensors; cu_seqlens None: dense."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float
    lists: Lists | None = None


class Norm(NamedTuple):
    """The norm of spatiotemporal_attention: q * rstd[0] * gain and k * rstd[1] are attended."""

    gain: Tensor  # [C]
    rstd: Tensor  # [2, B, N]


def threads_for(flops: int) -> int:
    """One for what takes less time than to wake the others; results do not depend on it."""
    return 1 if flops < 2_000_000 else torch.get_num_threads()


def _where(q: Tensor, flops: int) -> tuple[int, ...]:
    """The last arguments of a kernel."""
    return place(q) if on_cuda(q) else (threads_for(flops),)


def _strided(x: Tensor) -> Tensor:
    """X, or a copy, with rows that the kernel can read: on a GPU in words of 16 bytes."""
    if on_cuda(x):
        apart = [step for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
        if x.stride(-1) == 1 and not ptr(x) % 16 and not any(step % 8 for step in apart):
            return x
        return x.clone(memory_format=torch.contiguous_format)
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
    lengths = [end - start for start, end in pairwise(starts)]
    if min(lengths) < 0:
        raise ValueError(f"attention: {name} must not decrease, got {starts}")
    if max(lengths) > longest:
        raise ValueError(
            f"attention: max_seqlen of {name} must be at least {max(lengths)}, got {longest}"
        )


def _sequences(q: Tensor, options: Options) -> tuple[int, Tensor | None, Tensor | None]:
    """How many there are, and where they start."""
    cu_q, cu_k = options.cu_seqlens_q, options.cu_seqlens_k
    if cu_q is None:
        return q.shape[0], None, None
    return cu_q.numel() - 1, contiguous(cu_q), contiguous(cu_q if cu_k is None else cu_k)


def _pairs(q: Tensor, options: Options) -> int:
    """Of an element of q and a key that it sees, at most."""
    if options.lists is None:
        return q.numel() * options.max_seqlen_k
    return q.numel() // q.shape[1] * options.lists.pairs


def _lists(options: Options) -> tuple[int, int]:
    """Addresses of tiles and of runs."""
    lists = options.lists
    return (0, 0) if lists is None else (ptr(lists.tiles), ptr(lists.runs))


def _num_tiles(options: Options) -> int:
    return 0 if options.lists is None else options.lists.tiles.shape[0]


def _norm(norm: Norm | None) -> tuple[int, int, int]:
    """Addresses of gain, of rstd of q and of rstd of k."""
    return (0, 0, 0) if norm is None else (ptr(norm.gain), ptr(norm.rstd[0]), ptr(norm.rstd[1]))


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
    if cu_seqlens_q is not None and not on_cuda(q):
        cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        _check_lengths("cu_seqlens_k", cu_k, k.shape[0], max_seqlen_k)
    return forward(
        q, k, v, Options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, norm: Norm | None = None
) -> tuple[Tensor, Tensor]:
    """attention_fwd without the checks, and with the norm of spatiotemporal_attention."""
    assert not on_cuda(q) or (options.lists is None and norm is None)
    packed = options.cu_seqlens_q is not None
    sequences, cu_q, cu_k = _sequences(q, options)
    q, k, v = _strided(q), _strided(k), _strided(v)
    heads, head_dim = q.shape[-2:]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1])
    lse = torch.empty(shape, device=q.device)
    if o.numel() == 0:
        return o, lse
    if k.numel() == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    where = _where(q, 4 * _pairs(q, options))
    scratch = None
    if not on_cuda(q):
        scratch = torch.empty(where[0], _C.attention_fwd_scratch(head_dim, options.max_seqlen_k))
    _C.attention_fwd(
        ptr(q),
        ptr(k),
        ptr(v),
        ptr(cu_q),
        ptr(cu_k),
        *_lists(options),
        *_norm(norm),
        ptr(o),
        ptr(lse),
        ptr(scratch),
        sequences,
        heads,
        k.shape[-2],
        options.max_seqlen_q,
        options.max_seqlen_k,
        head_dim,
        o.numel() // (heads * head_dim),
        _num_tiles(options),
        *_strides(q, packed),
        *_strides(k, packed),
        *_strides(v, packed),
        DTYPE[q.dtype],
        options.causal,
        float(options.scale),
        *where,
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
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    options = Options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    backward((d_o, dlse), (q, k, v, o, lse), (dq, dk, dv), options)
    return dq, dk, dv


def backward(
    grads: tuple[Tensor, Tensor | None],  # d_o, dlse
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # q, k, v, o, lse
    out: tuple[Tensor | None, Tensor | None, Tensor],  # dq, dk, dv
    options: Options,
    norm: Norm | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dq, dk and dv: rows of tokens, a row contiguous.

    With dq and dk None returns what the norm's backward needs: dq_partial and dk_direct.
    """
    q, k, v, o, lse = saved
    dq, dk, dv = out
    assert not on_cuda(q) or (options.lists is None and norm is None)
    packed = options.cu_seqlens_q is not None
    sequences, cu_q, cu_k = _sequences(q, options)
    q, k, v = _strided(q), _strided(k), _strided(v)
    d_o, dlse = _strided(grads[0].contiguous()), contiguous(grads[1])
    (heads, head_dim), kv_heads = q.shape[-2:], k.shape[-2]
    queries, keys = q.numel() // (heads * head_dim), k.numel() // (kv_heads * head_dim)
    longest = options.max_seqlen_q, options.max_seqlen_k
    where = _where(q, 10 * _pairs(q, options))
    chunks, partial, direct = 1, None, None
    if on_cuda(q):
        scratch = torch.empty(lse.shape, device=q.device)
    else:
        # With lists, as many as keys in the average query's would make.
        seen = longest[1] if options.lists is None else options.lists.pairs // longest[0]
        if not _C.attention_bwd_is_long(*longest, heads // kv_heads):
            chunks = _C.attention_key_chunks(sequences, kv_heads, seen)
        size = _C.attention_bwd_scratch(head_dim, *longest, heads // kv_heads)
        scratch = torch.empty(where[0], size)
    if dq is None or chunks > 1:
        partial = torch.empty(chunks, queries, heads, head_dim)
    if dk is None:
        direct = torch.empty(keys, kv_heads, head_dim)
    _C.attention_bwd(
        ptr(q),
        ptr(k),
        ptr(v),
        ptr(cu_q),
        ptr(cu_k),
        *_lists(options),
        *_norm(norm),
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
        *longest,
        head_dim,
        queries,
        _num_tiles(options),
        *_strides(q, packed),
        *_strides(k, packed),
        *_strides(v, packed),
        0 if dq is None else dq.stride(-3),
        dv.stride(-3),
        chunks,
        DTYPE[q.dtype],
        options.causal,
        float(options.scale),
        *where,
    )
    return partial, direct
