"""The contrastive loss: symmetric InfoNCE with a learnt temperature and same-id positives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def contrastive_loss(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    temperature: Tensor,  # []
    *,
    ids: Tensor | None = None,  # [B]
    impl: Impl | None = None,
) -> Tensor:
    """Compare every video with every text, and make those of one id find each other.

    Equivalent to, in float32::

        logits = v @ t.T / temperature                       # [B, B]
        same = ids[:, None] == ids[None, :]                  # the identity without ids
        target = same / same.sum(1, keepdim=True)
        loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    Args:
        v: Video features, L2-normalised by the caller. float32, bfloat16, float16 (float64:
            reference).
        t: Text features, of v's dtype.
        temperature: Positive, any floating dtype.
        ids: Rows of equal id match, int32 or int64. None: row i of v matches row i of t alone.
        impl: Implementation; None lets dispatch choose.

    Returns:
        The mean over the rows and both directions, a float32 scalar (NaN without rows).

    Raises:
        ValueError: v is not [B, D] with D > 0, t not shaped like v, temperature not a scalar or not
            positive and finite, or ids not [B].
        TypeError: v or temperature is not floating point, t has another dtype than v, or ids is not
            int32 or int64.

    Saves v, t and six float32 a row for backward, which computes v @ t.T a second time. No [B, B]
    matrix is stored: of the products 256 rows exist at a time. Replaces two cross-entropies over
    ``sim_v2t`` and ``sim_t2v`` in InternVideo2's VTC loss.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018,
    arXiv:1807.03748; Radford et al., CLIP, 2021, arXiv:2103.00020.
    """
    check_pairs("contrastive_loss", v, t, ids, temperature=temperature)
    name = dispatch.choose("contrastive_loss", v, impl)
    if name == "reference":
        return reference(v, t, temperature, ids)
    return _ContrastiveLoss.apply(v, t, temperature, ids, name)[0]  # type: ignore[no-any-return]


def reference(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    temperature: Tensor,  # []
    ids: Tensor | None,  # [B]
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    if not torch.compiler.is_compiling():
        check_temperature(float(temperature.detach()))
    wide = torch.promote_types(v.dtype, torch.float32)
    logits = v.to(wide) @ t.to(wide).T / temperature.to(wide)
    if ids is None:
        ids = torch.arange(len(v), device=v.device)
    same = (ids[:, None] == ids[None, :]).to(wide)
    target = same / same.sum(1, keepdim=True)
    by_row = (target * logits.log_softmax(1)).sum(1)
    by_column = (target * logits.T.log_softmax(1)).sum(1)
    return -(by_row + by_column).mean() / 2


def check_temperature(value: float) -> None:
    """Raise ValueError unless the temperature is positive and finite; NaN is neither."""
    if not 0 < value < float("inf"):
        raise ValueError(
            f"contrastive_loss: temperature must be positive and finite, got {value:g}"
        )


def check_pairs(op: str, v: Tensor, t: Tensor, ids: Tensor | None, **scalars: Tensor) -> None:
    """The checks of every loss over pairs; scalars are its learnt scalars, by name."""
    if v.dim() != 2 or v.shape[1] == 0:
        raise ValueError(f"{op}: v must be [B, D] with D > 0, got {list(v.shape)}")
    if t.shape != v.shape:
        raise ValueError(f"{op}: t must be {list(v.shape)}, got {list(t.shape)}")
    for argument, value in {"v": v, **scalars}.items():
        if not value.is_floating_point():
            raise TypeError(f"{op}: {argument} must be floating point, got {value.dtype}")
    if t.dtype != v.dtype:
        raise TypeError(f"{op}: t must be {v.dtype}, got {t.dtype}")
    for argument, value in scalars.items():
        if value.dim() != 0:
            raise ValueError(f"{op}: {argument} must be a scalar, got {list(value.shape)}")
    if ids is None:
        return
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: ids must be int32 or int64, got {ids.dtype}")
    if ids.shape != v.shape[:1]:
        raise ValueError(f"{op}: ids must be [{v.shape[0]}], got {list(ids.shape)}")


class _ContrastiveLoss(Function):
    @staticmethod
    def forward(
        v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        return _fwd(v, t, temperature, ids, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        v, t, temperature, _, ctx.impl = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, t, temperature, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 5
        needs = list(ctx.needs_input_grad[:3])
        grads = _bwd(dloss, *ctx.saved_tensors, needs[:2], ctx.impl)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None)


def _fwd_fake(v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=v.device)
    return loss, loss.new_empty(6, v.shape[0])


def _bwd_fake(
    dloss: Tensor,
    v: Tensor,
    t: Tensor,
    temperature: Tensor,
    stats: Tensor,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dv, dt = (v.new_empty(v.shape if need else (0,)) for need in needs)
    return dv, dt, torch.empty_like(temperature)


_fwd = dispatch.define(
    "contrastive_loss_fwd(Tensor v, Tensor t, Tensor temperature, Tensor? ids, str impl) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "contrastive_loss_bwd(Tensor dloss, Tensor v, Tensor t, Tensor temperature, Tensor stats, "
    "bool[] needs, str impl) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
