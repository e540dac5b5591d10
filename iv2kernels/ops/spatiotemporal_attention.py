"""The attention of InternVideo2's block: packed qkv, RMSNorm of q and k over all heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl
from iv2kernels.ops.add_rms_norm import reference as _norm
from iv2kernels.ops.add_rms_norm import rms_norm
from iv2kernels.ops.attention import attention
from iv2kernels.ops.attention_blocks import BlockMask
from iv2kernels.ops.rope3d import Rope3d, rope3d
from iv2kernels.ops.rope3d import check as check_rope
from iv2kernels.ops.rope3d import reference as rotate


def spatiotemporal_attention(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    q_weight: Tensor | None = None,  # [C]
    k_weight: Tensor | None = None,  # [C]
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    blocks: BlockMask | None = None,
    rope: Rope3d | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Attend among the tokens of a clip, with q and k normalised over the full width.

    Equivalent to, with C = heads * head_dim::

        q, k, v = qkv.unbind(2)
        q, k = rms_norm(q.flatten(2), q_weight), rms_norm(k.flatten(2), k_weight)
        q, k = rope3d(q, rope), rope3d(k, rope)         # where rope is given
        s = scale * q kᵀ                                # per head; -inf where ~blocks.dense()
        o = softmax(s) v

    The norm costs no pass over q and k: one rstd a token scales rows and columns of the scores.

    Without blocks all tokens attend to each other (joint space-time attention, as InternVideo2
    does). The other patterns of video transformers are lists of blocks, over a grid (T, H, W) of
    tokens, each with or without a CLS token that sees and is seen by all::

        per_frame(grid)                      # space: a token sees its frame
        per_tube(grid)                       # time: its place in all frames; tokens in tube order
        spacetime_window(grid, frames, rows) # a window that slides over frames and rows

    With visible tokens only, as many in each frame (``tube_mask``, ``attention_guided_mask``), the
    grid of per_frame is (T, 1, visible), of per_tube (T, 1, visible) for a tube mask.

    Args:
        qkv: Queries, keys and values as one projection gives them. float32, bfloat16, float16
            (float64: reference).
        q_weight: Gain of the norm of q over all heads together, any floating dtype; None with
            k_weight None: no norm.
        k_weight: The same of k.
        scale: Of the scores; None: head_dim ** -0.5.
        eps: Added to the mean square of the norms.
        blocks: Lists of the key blocks that a query block sees, of N queries and keys; time goes
            with its density. None: all see all.
        rope: Rotary embedding of q and k after their norm. A rotated q no longer is one factor a
            token times qkv, so that the norms, ``rope3d`` and ``attention`` then run one by one.
        impl: Implementation; None lets dispatch choose.

    Returns:
        o [B, N, C] in qkv.dtype.

    Raises:
        ValueError: qkv is not [B, N, 3, heads, head_dim], or a weight is not [C] or given alone;
            blocks or rope is of another number of tokens, ids of rope of another number of
            samples; with rope, head_dim is odd, below 6 or above 512.
        TypeError: qkv is not floating point.

    Saves qkv, o, lse and two float32 per token for backward, which writes the gradient of qkv in
    place of a stack of three. Replaces the unbind, the two norms, the transposes and
    flash_attn_varlen_qkvpacked_func of the released block.

    Wang et al., InternVideo2, 2024, arXiv:2403.15377; Dao, FlashAttention-2, 2023,
    arXiv:2307.08691; Bertasius et al., TimeSformer (space and time patterns), 2021,
    arXiv:2102.05095.
    """
    _check(qkv, q_weight, k_weight)
    if blocks is not None and (blocks.num_queries, blocks.num_keys) != (qkv.shape[1],) * 2:
        raise ValueError(
            f"spatiotemporal_attention: blocks must be of {qkv.shape[1]} tokens, got "
            f"{blocks.num_queries} queries and {blocks.num_keys} keys"
        )
    if rope is not None:
        check_rope(qkv[:, :, 0], rope)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    name = dispatch.choose("spatiotemporal_attention", qkv, impl)
    if name == "reference":
        return reference(qkv, q_weight, k_weight, scale, eps, blocks, rope)
    if rope is not None:
        q, k, v = qkv.unbind(2)
        if q_weight is not None and k_weight is not None:
            q = rms_norm(q.flatten(2), q_weight, eps=eps, impl=name).view(q.shape)
            k = rms_norm(k.flatten(2), k_weight, eps=eps, impl=name).view(k.shape)
        q, k = rope3d(q, rope, impl=name), rope3d(k, rope, impl=name)
        rotated = attention(q, k, v, scale=scale, blocks=blocks, impl=name)
        return rotated.flatten(2)  # type: ignore[union-attr]
    lists = [] if blocks is None else [blocks.q_blocks, blocks.k_blocks, blocks.runs]
    pairs = 0 if blocks is None else blocks.pairs
    o, *_ = _SpatiotemporalAttention.apply(qkv, q_weight, k_weight, pairs, scale, eps, name, *lists)
    return o  # type: ignore[no-any-return]


def reference(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    q_weight: Tensor | None,  # [C]
    k_weight: Tensor | None,  # [C]
    scale: float,
    eps: float,
    blocks: BlockMask | None = None,
    rope: Rope3d | None = None,
) -> Tensor:
    """The definition."""
    q, k, v = qkv.unbind(2)
    if q_weight is not None and k_weight is not None:
        q = _norm(q.flatten(2), None, q_weight, None, None, eps)[0].view_as(q)
        k = _norm(k.flatten(2), None, k_weight, None, None, eps)[0].view_as(k)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    seen = None if blocks is None else blocks.dense().to(q.device)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, scale=scale
    )
    return o.transpose(1, 2).flatten(2)


def _check(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if not qkv.is_floating_point():
        raise TypeError(f"spatiotemporal_attention: qkv must be floating point, got {qkv.dtype}")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            "spatiotemporal_attention: qkv must be [B, N, 3, heads, head_dim], "
            f"got {list(qkv.shape)}"
        )
    if (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(
            f"spatiotemporal_attention: {missing} must be given with the other weight, got None"
        )
    width = qkv.shape[3] * qkv.shape[4]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (width,):
            raise ValueError(
                f"spatiotemporal_attention: {name} must be [{width}], got {list(weight.shape)}"
            )


class _SpatiotemporalAttention(Function):
    @staticmethod
    def forward(
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        pairs: int,
        scale: float,
        eps: float,
        impl: str,
        *lists: Tensor,  # none, or q_blocks, k_blocks and runs of BlockMask
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen = [lists[0], lists[2]] if lists else []
        return _fwd(qkv, q_weight, k_weight, seen, pairs, scale, eps, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, q_weight, k_weight, ctx.pairs, ctx.scale, _, ctx.impl, *lists = inputs
        o, lse, rstd = output
        ctx.mark_non_differentiable(lse, rstd)
        ctx.save_for_backward(qkv, q_weight, k_weight, o, lse, rstd, *lists[1:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor, *_: Any) -> tuple[Any, ...]:
        qkv, q_weight, k_weight, o, lse, rstd, *seen_by = ctx.saved_tensors
        dqkv, dq_weight, dk_weight = _bwd(
            d_o, qkv, q_weight, k_weight, o, lse, rstd, seen_by, ctx.pairs, ctx.scale, ctx.impl
        )
        return (
            dqkv,
            None if q_weight is None else dq_weight.to(q_weight.dtype),
            None if k_weight is None else dk_weight.to(k_weight.dtype),
            *(None,) * (len(ctx.needs_input_grad) - 3),
        )


def _fwd_fake(qkv: Tensor, q_weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, head_dim = qkv.shape[0], qkv.shape[1], qkv.shape[3], qkv.shape[4]
    o = torch.empty((batch, tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=qkv.device)
    shape = (0,) if q_weight is None else (2, batch, tokens)
    return o, lse, torch.empty(shape, dtype=torch.float32, device=qkv.device)


def _bwd_fake(
    d_o: Tensor, qkv: Tensor, q_weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    shape = (0,) if q_weight is None else (qkv.shape[3] * qkv.shape[4],)
    dweight = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    return dqkv, dweight, torch.empty_like(dweight)


_fwd = dispatch.define(
    "spatiotemporal_attention_fwd(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor[] lists, "
    "SymInt pairs, float scale, float eps, str impl) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "spatiotemporal_attention_bwd(Tensor d_o, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor o, Tensor lse, Tensor rstd, Tensor[] lists, SymInt pairs, float scale, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
