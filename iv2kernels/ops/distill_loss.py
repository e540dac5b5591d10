"""The distillation loss: LayerNorm, cosine with the teacher's rows, mean of 2 - 2 cos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def distill_loss(
    x: Tensor,  # [B, M, D]
    target: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    *,
    ids: Tensor | None = None,  # [B, M]
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """Normalise student features and compare their direction with the teacher's.

    Equivalent to, in float32::

        y = layer_norm(x, weight=norm_weight, bias=norm_bias, eps=eps)
        t = target[b, ids[b, m]]                        # target[b, m] without ids
        loss = mean over b, m of 2 - 2 * cosine_similarity(y, t)

    which is the mean squared distance of the L2-normalised rows. A row shorter than 1e-8 is
    divided by 1e-8, as torch.nn.functional.cosine_similarity does.

    Args:
        x: Output of the student's decoder, before its norm. float32, bfloat16, float16 (float64:
            reference).
        target: The teacher's features, any floating dtype, of any length: they are normalised
            here. It gets no gradient.
        norm_weight: Gain of the LayerNorm, any floating dtype.
        norm_bias: Bias of the LayerNorm, any floating dtype.
        ids: Row of target for each row of x, int32 or int64. None: rows are paired in order, M = N.
        eps: Added to the variance in the LayerNorm.
        impl: Implementation; None lets dispatch choose.

    Returns:
        The mean over the B*M rows, a float32 scalar (NaN without rows).

    Raises:
        ValueError: x or target is not [B, ., D] alike, norm_weight or norm_bias not [D], ids not
            [B, M] or out of range (on a GPU, where looking would wait, the loss is then NaN), or M
            differs from N without ids.
        TypeError: x or target is not floating point, ids is not int32 or int64, or target needs a
            gradient.

    The gradients are found in the forward pass, row by row, and backward only scales them: dx (in
    x.dtype, in the end rounded twice unless the loss's gradient is a power of two) is saved, x and
    target are not, and no gathered or normalised copy is made. Replaces gather, LayerNorm, two L2
    norms and the loss of InternVideo2's decoders.

    Wang et al., InternVideo2, 2024, arXiv:2403.15377; Li et al., Unmasked Teacher, 2023,
    arXiv:2303.16058.
    """
    _check(x, target, norm_weight, norm_bias, ids)
    name = dispatch.choose("distill_loss", x, impl)
    if name == "reference":
        return reference(x, target, norm_weight, norm_bias, ids, eps)
    grads = torch.is_grad_enabled()
    need_affine = grads and (norm_weight.requires_grad or norm_bias.requires_grad)
    needs = (grads and x.requires_grad, need_affine)
    return _DistillLoss.apply(x, target, norm_weight, norm_bias, ids, eps, needs, name)[0]  # type: ignore[no-any-return]


def reference(
    x: Tensor,  # [B, M, D]
    target: Tensor,  # [B, N, D]
    norm_weight: Tensor,  # [D]
    norm_bias: Tensor,  # [D]
    ids: Tensor | None,  # [B, M]
    eps: float,
) -> Tensor:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if ids is not None:
        target = target.gather(1, ids.long()[..., None].expand(-1, -1, target.shape[-1]))
    normed = F.layer_norm(x.to(wide), x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps)
    return (2 - 2 * F.cosine_similarity(normed, target.to(wide), dim=-1)).mean()


def _check(
    x: Tensor, target: Tensor, norm_weight: Tensor, norm_bias: Tensor, ids: Tensor | None
) -> None:
    for argument, value in (("x", x), ("target", target)):
        if not value.is_floating_point():
            raise TypeError(f"distill_loss: {argument} must be floating point, got {value.dtype}")
    if target.requires_grad:
        raise TypeError("distill_loss: target must be detached, got one that needs a gradient")
    if x.dim() != 3:
        raise ValueError(f"distill_loss: x must be [B, M, D], got {list(x.shape)}")
    batch, rows, dim = x.shape
    expected = f"[{batch}, {rows if ids is None else 'N'}, {dim}]"
    if (
        target.dim() != 3
        or (target.shape[0], target.shape[2]) != (batch, dim)
        or (ids is None and target.shape[1] != rows)
    ):
        raise ValueError(f"distill_loss: target must be {expected}, got {list(target.shape)}")
    for argument, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value.shape != x.shape[-1:]:
            raise ValueError(f"distill_loss: {argument} must be [{dim}], got {list(value.shape)}")
    if ids is None:
        return
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"distill_loss: ids must be int32 or int64, got {ids.dtype}")
    if ids.shape != x.shape[:2]:
        raise ValueError(f"distill_loss: ids must be [{batch}, {rows}], got {list(ids.shape)}")


class _DistillLoss(Function):
    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        ids: Tensor | None,
        eps: float,
        needs: tuple[bool, bool],
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _fwd(x, target, norm_weight, norm_bias, ids, eps, list(needs), impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, norm_weight, norm_bias, *_, impl = inputs
        _, *units = output
        ctx.mark_non_differentiable(*units)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*units)
        ctx.rows, ctx.dim = x.shape[0] * x.shape[1], x.shape[2]
        ctx.dtypes, ctx.impl = (norm_weight.dtype, norm_bias.dtype), impl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 8
        dx, dweight, dbias = _bwd(dloss, *ctx.saved_tensors, ctx.rows, ctx.dim, ctx.impl)
        need_dx, _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            dx if need_dx else None,
            None,
            dweight.to(weight_dtype) if need_dweight else None,
            dbias.to(bias_dtype) if need_dbias else None,
            *(None,) * 4,
        )


def _fwd_fake(
    x: Tensor,
    target: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ids: Tensor | None,
    eps: float,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=x.device)
    affine = loss.new_empty(x.shape[-1] if needs[1] else 0)
    return loss, dx, affine, torch.empty_like(affine)


def _bwd_fake(
    dloss: Tensor, dx_unit: Tensor, dweight_unit: Tensor, dbias_unit: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(dx_unit),
        torch.empty_like(dweight_unit),
        torch.empty_like(dbias_unit),
    )


_fwd = dispatch.define(
    "distill_loss_fwd(Tensor x, Tensor target, Tensor norm_weight, Tensor norm_bias, Tensor? ids, "
    "float eps, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "distill_loss_bwd(Tensor dloss, Tensor dx_unit, Tensor dweight_unit, Tensor dbias_unit, "
    "SymInt rows, SymInt dim, str impl) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
