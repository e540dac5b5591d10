"""Residual add with LayerScale and drop path, then RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def add_rms_norm(
    x: Tensor,  # [..., C]
    residual: Tensor | None,  # [..., C]
    weight: Tensor,  # [C]
    *,
    layer_scale: Tensor | None = None,  # [C]
    drop_scale: Tensor | None = None,  # [B], 0 or 1/keep
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a scaled branch to the residual stream and RMS-normalise the sum.

    Equivalent to, in float32::

        r = residual + drop_scale[:, None] * layer_scale * x   # without residual: the branch alone
        y = r * rsqrt(mean(r**2, -1) + eps) * weight           # r as it is stored

    Args:
        x: Output of the branch. float32, bfloat16, float16 (float64: reference).
        residual: The residual stream, in any of these dtypes, or None at the first block.
        weight: Gain of the norm, any floating dtype.
        layer_scale: LayerScale's gain of the branch.
        drop_scale: Drop-path factor per sample (the first axis of x): 0, or 1 / keep probability.
            It gets no gradient.
        eps: Added to the mean square.
        impl: Implementation; None lets dispatch choose.

    Returns:
        y in x.dtype, and r, the new residual stream, in residual.dtype (x.dtype without residual).

    Raises:
        ValueError: weight or layer_scale is not [C], residual is not shaped like x, or drop_scale
            is not [B].
        TypeError: x is not floating point.

    Saves r and one float32 per row for backward (and x where layer_scale needs a gradient).
    Replaces flash_attn.ops.rms_norm.DropoutAddRMSNorm(prenorm=True) at dropout 0.

    Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """
    _check("add_rms_norm", x, residual, weight, layer_scale, drop_scale)
    name = dispatch.choose("add_rms_norm", x, impl)
    if name == "reference":
        return reference(x, residual, weight, layer_scale, drop_scale, eps)
    y, r, _ = _AddRmsNorm.apply(x, residual, weight, layer_scale, drop_scale, eps, name)
    return y, r


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    *,
    eps: float = 1e-6,
    impl: Impl | None = None,
) -> Tensor:
    """RMS-normalise the last axis: ``x * rsqrt(mean(x**2, -1) + eps) * weight`` in float32.

    Args:
        x: float32, bfloat16, float16 (float64: reference).
        weight: Gain, any floating dtype.
        eps: Added to the mean square.
        impl: Implementation; None lets dispatch choose.

    Returns:
        A tensor like x.

    Raises:
        ValueError: weight is not [C].
        TypeError: x is not floating point.

    Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """
    _check("rms_norm", x, None, weight, None, None)
    name = dispatch.choose("add_rms_norm", x, impl)
    if name == "reference":
        return reference(x, None, weight, None, None, eps)[0]
    return _AddRmsNorm.apply(x, None, weight, None, None, eps, name)[0]  # type: ignore[no-any-return]


def reference(
    x: Tensor,  # [..., C]
    residual: Tensor | None,  # [..., C]
    weight: Tensor,  # [C]
    layer_scale: Tensor | None,  # [C]
    drop_scale: Tensor | None,  # [B]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    r = x.to(wide)
    if drop_scale is not None:
        r = r * drop_scale.to(wide).view(-1, *[1] * (x.dim() - 1))
    if layer_scale is not None:
        r = r * layer_scale.to(wide)
    if residual is not None:
        r = r + residual.to(wide)
    r = r.to(x.dtype if residual is None else residual.dtype)
    stored = r.to(wide)
    y = stored * torch.rsqrt(stored.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return y.to(x.dtype), r


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., C], got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must be shaped like x {list(x.shape)}, got {list(residual.shape)}"
        )
    for argument, value in (("weight", weight), ("layer_scale", layer_scale)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {argument} must be [{x.shape[-1]}], got {list(value.shape)}")
    if drop_scale is not None and (x.dim() < 2 or drop_scale.shape != x.shape[:1]):
        raise ValueError(
            f"{op}: drop_scale must be [{x.shape[0]}], got {list(drop_scale.shape)} "
            f"for x {list(x.shape)}"
        )


class _AddRmsNorm(Function):
    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        layer_scale: Tensor | None,
        drop_scale: Tensor | None,
        eps: float,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(x, residual, weight, layer_scale, drop_scale, eps, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, residual, weight, layer_scale, drop_scale, _, impl = inputs
        _, r, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.scale_grad = layer_scale is not None and layer_scale.requires_grad
        ctx.has_residual = residual is not None
        ctx.impl, ctx.x_dtype = impl, x.dtype
        kept = x if ctx.scale_grad else None
        ctx.save_for_backward(kept, r, rstd, weight, layer_scale, drop_scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dr: Tensor | None, _: Any) -> tuple[Any, ...]:
        x, r, rstd, weight, layer_scale, drop_scale = ctx.saved_tensors
        if dy is None and dr is None:
            return (None,) * 7
        dx, dresidual, dweight, dlayer_scale = _bwd(
            dy, dr, x, r, rstd, weight, layer_scale, drop_scale, ctx.x_dtype, ctx.impl
        )
        return (
            dx,
            dresidual if ctx.has_residual else None,
            dweight.to(weight.dtype),
            dlayer_scale.to(layer_scale.dtype) if ctx.scale_grad else None,
            None,
            None,
            None,
        )


def _fwd_fake(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.empty(x.shape, dtype=(x if residual is None else residual).dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), r, rstd


def _bwd_fake(
    dy: Tensor | None,
    dr: Tensor | None,
    x: Tensor | None,
    r: Tensor,
    rstd: Tensor,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty(r.shape, dtype=x_dtype, device=r.device)
    sums = torch.empty(r.shape[-1:], dtype=torch.float32, device=r.device)
    return dx, torch.empty(r.shape, dtype=r.dtype, device=r.device), sums, torch.empty_like(sums)


_fwd = dispatch.define(
    "add_rms_norm_fwd(Tensor x, Tensor? residual, Tensor weight, Tensor? layer_scale, "
    "Tensor? drop_scale, float eps, str impl) -> (Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "add_rms_norm_bwd(Tensor? dy, Tensor? dr, Tensor? x, Tensor r, Tensor rstd, Tensor weight, "
    "Tensor? layer_scale, Tensor? drop_scale, ScalarType x_dtype, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
