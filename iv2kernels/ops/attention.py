"""Softmax attention: dense over strided views, packed sequences, or lists of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import LIBRARIES, Function, Impl
from iv2kernels.library import attention as library
from iv2kernels.ops.attention_blocks import BlockMask, attention_blocks, bwd_fake

# What csrc/cuda/attention.cu and attention_bwd.cu have kernels of.
CUDA_HEAD_DIMS = (64, 88, 128)


@dataclass(frozen=True)
class Packed:
    """Sequences laid end to end: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1].

    Attributes:
        cu_seqlens_q: [S + 1] int32, from 0 to the number of queries; an empty sequence is allowed.
        max_seqlen_q: The longest sequence of queries, or more.
        cu_seqlens_k: The same for keys and values; None: that of the queries.
        max_seqlen_k: The same for keys and values; None: that of the queries.
    """

    cu_seqlens_q: Tensor  # [S + 1] int32
    max_seqlen_q: int
    cu_seqlens_k: Tensor | None = None  # [S + 1] int32
    max_seqlen_k: int | None = None


def attention(
    q: Tensor,  # [B, Nq, heads, head_dim] | [Tq, heads, head_dim]
    k: Tensor,  # [B, Nk, kv_heads, head_dim] | [Tk, kv_heads, head_dim]
    v: Tensor,  # [B, Nk, kv_heads, head_dim] | [Tk, kv_heads, head_dim]
    *,
    causal: bool = False,
    scale: float | None = None,
    packed: Packed | None = None,
    blocks: BlockMask | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to the keys of its sequence.

    Equivalent to, for each head (a kv head serves heads / kv_heads neighbouring heads)::

        s = scale * q kᵀ                              # causal: -inf where key > query + Nk - Nq;
                                                      # blocks: -inf where ~blocks.dense()
        lse = logsumexp(s, -1)
        o = exp(s - lse) v                            # 0 where no key is visible (lse = -inf)

    Args:
        q: Queries; any strides with a contiguous last axis are read in place, such as views of a
            packed qkv [B, N, 3, heads, head_dim]. float32, bfloat16, float16 (float64: reference).
        k: Keys, in the dtype of q.
        v: Values, shaped like k.
        causal: A query sees keys up to its own position; with different lengths the last query
            is aligned to the last key.
        scale: Of the scores; None: head_dim ** -0.5.
        packed: Lengths of the sequences when q, k and v hold several, end to end.
        blocks: Lists of the key blocks that a query block sees, for dense q, k and v without
            causal; time goes with its density. per_frame, per_tube,
            spacetime_window and all_blocks build them.
        return_lse: Also return the log-sum-exp of the scores; its gradient is taken into account.
        impl: Implementation; None lets dispatch choose.

    Returns:
        o like q, and with return_lse, lse [B, heads, Nq] or [heads, Tq] in float32.

    Raises:
        ValueError: Shapes do not fit together, heads is not a multiple of kv_heads, or cu_seqlens
            does not run, without decreasing, from 0 to the number of rows with no sequence longer
            than max_seqlen; blocks is given with causal or packed, or is of other lengths.
        TypeError: q is not floating point, k or v has another dtype, or cu_seqlens is not int32.

    Saves q, k, v, o and lse for backward; never the scores. Extra memory on the CPU does not grow
    beyond 8,192 tokens (16 MB a thread at head_dim 88). An additive bias and dropout are not taken:
    use torch.nn.functional.scaled_dot_product_attention. Replaces flash_attn.flash_attn_func,
    flash_attn_varlen_func and flash_attn_varlen_qkvpacked_func.

    Dao, FlashAttention-2, 2023, arXiv:2307.08691.
    """
    _check(q, k, v, packed)
    if blocks is not None:
        _check_blocks(q, k, causal, packed, blocks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refuses = None
    if q.is_cuda:  # the CPU's take everything
        refuses = partial(
            _refuses, q=q, k=k, causal=causal, packed=packed, blocks=blocks, lse=return_lse
        )
    name = dispatch.choose("attention", q, impl, refuses)
    if name in LIBRARIES:
        return library.attention(q, k, v, causal, scale, packed, name)
    if name == "reference":
        o, lse = reference(q, k, v, causal, scale, packed, blocks)
    elif blocks is not None:
        o, lse = attention_blocks(q, k, v, blocks, scale, name)
    else:
        o, lse = _Attention.apply(q, k, v, *_lengths(q, k, packed), causal, scale, name)
    return (o, lse) if return_lse else o


def reference(
    q: Tensor,  # [B, Nq, heads, head_dim] | [Tq, heads, head_dim]
    k: Tensor,  # [B, Nk, kv_heads, head_dim] | [Tk, kv_heads, head_dim]
    v: Tensor,  # [B, Nk, kv_heads, head_dim] | [Tk, kv_heads, head_dim]
    causal: bool,
    scale: float,
    packed: Packed | None,
    blocks: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition."""
    if packed is not None:
        cu_q = packed.cu_seqlens_q.tolist()
        cu_k = cu_q if packed.cu_seqlens_k is None else packed.cu_seqlens_k.tolist()
        parts = [
            reference(q[a:b][None], k[c:d][None], v[c:d][None], causal, scale, None)
            for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)
        ]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    s = s * scale
    if causal:
        nq, nk = s.shape[-2:]
        seen = torch.ones(nq, nk, dtype=torch.bool, device=s.device).tril(nk - nq)
        s = s.masked_fill(~seen, -torch.inf)
    if blocks is not None:
        s = s.masked_fill(~blocks.dense().to(s.device), -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v), lse


def _check(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None) -> None:
    if not q.is_floating_point():
        raise TypeError(f"attention: q must be floating point, got {q.dtype}")
    dims = "[B, N, heads, head_dim]" if packed is None else "[T, heads, head_dim]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} must be {q.dtype} like q, got {x.dtype}")
        if x.dim() != (4 if packed is None else 3):
            raise ValueError(f"attention: {name} must be {dims}, got {list(x.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v must be shaped like k {list(k.shape)}, got {list(v.shape)}")
    if k.shape[-1] != q.shape[-1] or (packed is None and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"attention: k must have the batch and head_dim of q {list(q.shape)}, "
            f"got {list(k.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"attention: heads of k must divide the {q.shape[-2]} heads of q, got {k.shape[-2]}"
        )
    if packed is not None:
        _check_packed(packed)


def _check_blocks(
    q: Tensor, k: Tensor, causal: bool, packed: Packed | None, blocks: BlockMask
) -> None:
    if causal or packed is not None:
        other = "causal" if causal else "packed"
        raise ValueError(f"attention: blocks must be given without {other}, got both")
    if (blocks.num_queries, blocks.num_keys) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"attention: blocks must be of {q.shape[1]} queries and {k.shape[1]} keys, "
            f"got {blocks.num_queries} and {blocks.num_keys}"
        )


def _check_packed(packed: Packed) -> None:
    sizes = (("cu_seqlens_q", packed.cu_seqlens_q), ("cu_seqlens_k", packed.cu_seqlens_k))
    for name, cu_seqlens in sizes:
        if cu_seqlens is None:
            continue
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"attention: {name} must be int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"attention: {name} must be [sequences + 1], got {list(cu_seqlens.shape)}"
            )
    k = packed.cu_seqlens_k
    if k is not None and k.shape != packed.cu_seqlens_q.shape:
        raise ValueError(
            f"attention: cu_seqlens_k must be {list(packed.cu_seqlens_q.shape)} like "
            f"cu_seqlens_q, got {list(k.shape)}"
        )


def _refuses(
    impl: str,
    q: Tensor,
    k: Tensor,
    causal: bool,
    packed: Packed | None,
    blocks: BlockMask | None,
    lse: bool,
) -> str | None:
    """The reason why an implementation on a GPU does not take these, or None."""
    if impl in LIBRARIES:
        if blocks is not None or lse:
            return f"it does not take {'blocks' if blocks is not None else 'return_lse'}"
        return library.refuses(impl, q, k, causal, packed)
    if impl != "native":
        return None
    if q.shape[-1] not in CUDA_HEAD_DIMS:
        return f"it takes head_dim 64, 88 or 128 on a GPU, got {q.shape[-1]}"
    return None if blocks is None else "it does not take blocks on a GPU"


def _lengths(
    q: Tensor, k: Tensor, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    if packed is None:
        return None, None, q.shape[1], k.shape[1]
    longest = packed.max_seqlen_q if packed.max_seqlen_k is None else packed.max_seqlen_k
    return packed.cu_seqlens_q, packed.cu_seqlens_k, packed.max_seqlen_q, longest


class _Attention(Function):
    @staticmethod
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
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        return _fwd(  # type: ignore[no-any-return]
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, impl
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if d_o is None and dlse is None:
            return (None,) * 10
        d_o = torch.zeros_like(o) if d_o is None else d_o
        grads = _bwd(d_o, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options)
        return (*grads, *(None,) * 7)


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dense = q.dim() == 4
    shape = (q.shape[0], q.shape[2], q.shape[1]) if dense else (q.shape[1], q.shape[0])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


_fwd = dispatch.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, str impl) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "attention_bwd(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float scale, str impl) -> (Tensor, Tensor, Tensor)",
    bwd_fake,
)
