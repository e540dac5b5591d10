"""Pooling by one query a head, in absorbed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def attention_pool(
    x: Tensor,  # [B, N, C]
    query: Tensor,  # [B, heads, C]
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise tokens and average them, weighted by their attention to one query a head.

    Equivalent to, in float32::

        xhat = layer_norm(x, eps=eps)            # without gain and bias
        p = softmax(query @ xhat.transpose(1, 2), -1)    # [B, heads, N]
        z, probs = p @ xhat, p.mean(1)

    This is multi-head attention of one query over x with the projections moved off the tokens: the
    key projection Wk, the LayerNorm's gain g and the scale belong to query (``Wk_h.T q_h * g *
    scale``), the value projection comes after (``Wv_h (g * z_h + bias)``), and the key's bias
    cancels in the softmax. The tokens' two C x C projections, of 4 N C² operations a sample, become
    4 N heads C. ``iv2kernels.nn.AttentionPool`` is the whole head.

    Args:
        x: Tokens. float32, bfloat16, float16 (float64: reference).
        query: One absorbed query a head, any floating dtype.
        eps: Added to the variance in the LayerNorm.
        impl: Implementation; None lets dispatch choose.

    Returns:
        z, [B, heads, C] in x.dtype, and probs, [B, N] float32, the attention averaged over the
        heads, without gradient.

    Raises:
        ValueError: x is not [B, N, C], or query not [B, heads, C].
        TypeError: x or query is not floating point.

    Saves x, query, two float32 per token and two per token and head (heads rounded up to 16) for
    backward; the normalised tokens are never stored.

    The head is CoCa's, Yu et al., 2022, arXiv:2205.01917; InternVideo2 puts its query at the mean
    of the tokens.
    """
    for argument, value in (("x", x), ("query", query)):
        if not value.is_floating_point():
            raise TypeError(f"attention_pool: {argument} must be floating point, got {value.dtype}")
    if x.dim() != 3:
        raise ValueError(f"attention_pool: x must be [B, N, C], got {list(x.shape)}")
    if query.dim() != 3 or query.shape[::2] != x.shape[::2]:
        raise ValueError(
            f"attention_pool: query must be [{x.shape[0]}, heads, {x.shape[2]}], "
            f"got {list(query.shape)}"
        )
    name = dispatch.choose("attention_pool", x, impl)
    if name == "reference":
        return reference(x, query, eps)
    z, probs, *_ = _AttentionPool.apply(x, query, eps, name)
    return z, probs


def reference(
    x: Tensor,  # [B, N, C]
    query: Tensor,  # [B, heads, C]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    p = torch.softmax(query.to(wide) @ normed.transpose(1, 2), -1)
    return (p @ normed).to(x.dtype), p.detach().mean(1)


class _AttentionPool(Function):
    @staticmethod
    def forward(x: Tensor, query: Tensor, eps: float, impl: str) -> tuple[Tensor, ...]:
        return _fwd(x, query, eps, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, query, _, impl = inputs
        _, probs, *kept = output
        ctx.mark_non_differentiable(probs, *kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, query, *kept)
        ctx.impl = impl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dz is None:
            return None, None, None, None
        x, query, *kept = ctx.saved_tensors
        need_dx, need_dquery, *_ = ctx.needs_input_grad
        dx, dquery = _bwd(dz, x, query, *kept, [need_dx, need_dquery], ctx.impl)
        return (
            dx if need_dx else None,
            dquery.to(query.dtype) if need_dquery else None,
            None,
            None,
        )


def _fwd_fake(x: Tensor, query: Tensor, eps: float, impl: str) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    lanes = (query.shape[1] + 15) // 16 * 16

    def floats(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    z = torch.empty(query.shape, dtype=x.dtype, device=x.device)
    probs, stats = floats(batch, tokens), floats(2, batch, tokens)
    return z, probs, stats, floats(batch, tokens, lanes), floats(batch, tokens, lanes)


def _bwd_fake(
    dz: Tensor,
    x: Tensor,
    query: Tensor,
    stats: Tensor,
    logits: Tensor,
    p: Tensor,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=x.device)
    shape = query.shape if needs[1] else (0,)
    return dx, torch.empty(shape, dtype=torch.float32, device=x.device)


_fwd = dispatch.define(
    "attention_pool_fwd(Tensor x, Tensor query, float eps, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "attention_pool_bwd(Tensor dz, Tensor x, Tensor query, Tensor stats, Tensor logits, Tensor p, "
    "bool[] needs, str impl) -> (Tensor, Tensor)",
    _bwd_fake,
)
