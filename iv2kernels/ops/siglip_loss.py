"""The pairwise sigmoid loss of SigLIP, with same-id positives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl
from iv2kernels.ops.contrastive_loss import check_pairs


def siglip_loss(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    *,
    ids: Tensor | None = None,  # [B]
    impl: Impl | None = None,
) -> Tensor:
    """Ask of every pair of a video and a text, on its own, whether the two match.

    Equivalent to, in float32::

        z = 2 * (ids[:, None] == ids[None, :]) - 1           # 2 * eye(B) - 1 without ids
        loss = -logsigmoid(z * (scale * v @ t.T + bias)).sum() / B

    Args:
        v: Video features, L2-normalised by the caller. float32, bfloat16, float16 (float64:
            reference).
        t: Text features, of v's dtype.
        scale: Any floating dtype. SigLIP learns its logarithm, from log 10.
        bias: Any floating dtype. SigLIP starts at -10.
        ids: Rows of equal id match, int32 or int64. None: row i of v matches row i of t alone.
        impl: Implementation; None lets dispatch choose.

    Returns:
        The sum over pairs divided by B, a float32 scalar (NaN without rows).

    Raises:
        ValueError: v is not [B, D] with D > 0, t not shaped like v, scale or bias not a scalar, or
            ids not [B].
        TypeError: v, scale or bias is not floating point, t has another dtype than v, or ids is not
            int32 or int64.

    Saves v, t and one float32 a row for backward, which computes v @ t.T a second time. No [B, B]
    matrix is stored: of the products 256 rows exist at a time.

    Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, arXiv:2303.15343.
    """
    check_pairs("siglip_loss", v, t, ids, scale=scale, bias=bias)
    name = dispatch.choose("siglip_loss", v, impl)
    if name == "reference":
        return reference(v, t, scale, bias, ids)
    return _SiglipLoss.apply(v, t, scale, bias, ids, name)[0]  # type: ignore[no-any-return]


def reference(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    ids: Tensor | None,  # [B]
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(v.dtype, torch.float32)
    logits = scale.to(wide) * (v.to(wide) @ t.to(wide).T) + bias.to(wide)
    if ids is None:
        ids = torch.arange(len(v), device=v.device)
    z = 2 * (ids[:, None] == ids[None, :]).to(wide) - 1
    return -F.logsigmoid(z * logits).sum() / len(v)


class _SiglipLoss(Function):
    @staticmethod
    def forward(
        v: Tensor, t: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        return _fwd(v, t, scale, bias, ids, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        v, t, scale, bias, _, ctx.impl = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, t, scale, bias, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 6
        needs = list(ctx.needs_input_grad[:4])
        grads = _bwd(dloss, *ctx.saved_tensors, needs[:2], ctx.impl)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


def _fwd_fake(v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=v.device)
    return loss, loss.new_empty(v.shape[0])


def _bwd_fake(
    dloss: Tensor,
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dv, dt = (v.new_empty(v.shape if need else (0,)) for need in needs)
    return dv, dt, torch.empty_like(scale), torch.empty_like(bias)


_fwd = dispatch.define(
    "siglip_loss_fwd(Tensor v, Tensor t, Tensor scale, Tensor bias, Tensor? ids, str impl) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "siglip_loss_bwd(Tensor dloss, Tensor v, Tensor t, Tensor scale, Tensor bias, Tensor labels, "
    "bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
