"""The attention of InternVideo2's block: packed qkv, RMSNorm of q and k over all heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl
from iv2kernels.ops.add_rms_norm import reference as _norm


def spatiotemporal_attention(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    q_weight: Tensor | None = None,  # [C]
    k_weight: Tensor | None = None,  # [C]
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> Tensor:
    """Attend jointly among all tokens of a clip, with q and k normalised over the full width.

    Equivalent to, with C = heads * head_dim::

        q, k, v = qkv.unbind(2)
        q, k = rms_norm(q.flatten(2), q_weight), rms_norm(k.flatten(2), k_weight)
        o = softmax(scale * q kᵀ) v                     # per head

    The norm costs no pass over q and k: one rstd a token scales rows and columns of the scores.

    Args:
        qkv: Queries, keys and values as one projection gives them. float32, bfloat16, float16
            (float64: reference).
        q_weight: Gain of the norm of q over all heads together, any floating dtype; None with
            k_weight None: no norm.
        k_weight: The same of k.
        scale: Of the scores; None: head_dim ** -0.5.
        eps: Added to the mean square of the norms.
        impl: Implementation; None lets dispatch choose.

    Returns:
        o [B, N, C] in qkv.dtype.

    Raises:
        ValueError: qkv is not [B, N, 3, heads, head_dim], or a weight is not [C] or given alone.
        TypeError: qkv is not floating point.

    Saves qkv, o, lse and two float32 per token for backward, which writes the gradient of qkv in
    place of a stack of three. Replaces the unbind, the two norms, the transposes and
    flash_attn_varlen_qkvpacked_func of the released block.

    Wang et al., InternVideo2, 2024, arXiv:2403.15377; Dao, FlashAttention-2, 2023,
    arXiv:2307.08691.
    """
    _check(qkv, q_weight, k_weight)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    name = dispatch.choose("spatiotemporal_attention", qkv, impl)
    if name == "reference":
        return reference(qkv, q_weight, k_weight, scale, eps)
    o, *_ = _SpatiotemporalAttention.apply(qkv, q_weight, k_weight, scale, eps, name)
    return o  # type: ignore[no-any-return]


def reference(
    qkv: Tensor,  # [B, N, 3, heads, head_dim]
    q_weight: Tensor | None,  # [C]
    k_weight: Tensor | None,  # [C]
    scale: float,
    eps: float,
) -> Tensor:
    """The definition."""
    q, k, v = qkv.unbind(2)
    if q_weight is not None and k_weight is not None:
        q = _norm(q.flatten(2), None, q_weight, None, None, eps)[0].view_as(q)
        k = _norm(k.flatten(2), None, k_weight, None, None, eps)[0].view_as(k)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale
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
        scale: float,
        eps: float,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(qkv, q_weight, k_weight, scale, eps, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        qkv, q_weight, k_weight, ctx.scale, _, ctx.impl = inputs
        o, lse, rstd = output
        ctx.mark_non_differentiable(lse, rstd)
        ctx.save_for_backward(qkv, q_weight, k_weight, o, lse, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor, *_: Any) -> tuple[Any, ...]:
        qkv, q_weight, k_weight, o, lse, rstd = ctx.saved_tensors
        dqkv, dq_weight, dk_weight = _bwd(
            d_o, qkv, q_weight, k_weight, o, lse, rstd, ctx.scale, ctx.impl
        )
        return (
            dqkv,
            None if q_weight is None else dq_weight.to(q_weight.dtype),
            None if k_weight is None else dk_weight.to(k_weight.dtype),
            None,
            None,
            None,
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
    "spatiotemporal_attention_fwd(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float scale, "
    "float eps, str impl) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "spatiotemporal_attention_bwd(Tensor d_o, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor o, Tensor lse, Tensor rstd, float scale, str impl) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
