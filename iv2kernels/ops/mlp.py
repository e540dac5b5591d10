"""Two linear layers with a GELU between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl
from iv2kernels.ops.linear import check_layer, under_autocast


def mlp(
    x: Tensor,  # [..., C]
    fc1_weight: Tensor,  # [H, C]
    fc1_bias: Tensor,  # [H]
    fc2_weight: Tensor,  # [C_out, H]
    fc2_bias: Tensor,  # [C_out]
    *,
    approximate: str = "tanh",
    impl: Impl | None = None,
) -> Tensor:
    """Apply a linear layer, GELU and another linear layer.

    Equivalent to::

        z = x @ fc1_weight.T + fc1_bias
        y = gelu(z, approximate) @ fc2_weight.T + fc2_bias

    Args:
        x: float32, bfloat16, float16 (float64: reference). Under autocast all five are cast.
        fc1_weight: In x's dtype, as the other three.
        fc1_bias: Bias of the hidden layer.
        fc2_weight: Weight of the second layer.
        fc2_bias: Bias of the second layer.
        approximate: GELU flavour, named as in torch: "tanh", or "none", the exact erf form.
        impl: Implementation; None lets dispatch choose.

    Returns:
        [..., C_out] in x.dtype.

    Raises:
        ValueError: A weight or bias does not fit, or approximate is neither "tanh" nor "none".
        TypeError: x is not floating point, or dtypes differ outside autocast.

    Saves x and z for backward, which recomputes gelu(z) together with its derivative and the sum of
    the first bias's gradient. Replaces flash_attn.ops.fused_dense.FusedMLP with recomputed
    activation.

    Hendrycks & Gimpel, Gaussian Error Linear Units, 2016, arXiv:1606.08415.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"mlp: approximate must be tanh or none, got {approximate}")
    check_layer("mlp", "fc1_weight", "fc1_bias", x, fc1_weight, fc1_bias)
    hidden = fc1_weight.shape[:1]
    if fc2_weight.dim() != 2 or fc2_weight.shape[1:] != hidden:
        raise ValueError(
            f"mlp: fc2_weight must be [C_out, {hidden[0]}], got {list(fc2_weight.shape)}"
        )
    if fc2_bias.shape != fc2_weight.shape[:1]:
        raise ValueError(
            f"mlp: fc2_bias must be [{fc2_weight.shape[0]}], got {list(fc2_bias.shape)}"
        )
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = args = under_autocast(
        "mlp",
        {
            "x": x,
            "fc1_weight": fc1_weight,
            "fc1_bias": fc1_bias,
            "fc2_weight": fc2_weight,
            "fc2_bias": fc2_bias,
        },
    )
    name = dispatch.choose("mlp", x, impl)
    if name == "reference":
        return reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate)
    save = torch.is_grad_enabled() and any(value.requires_grad for value in args)
    return _Mlp.apply(*args, approximate, save, name)[0]  # type: ignore[no-any-return]


def reference(
    x: Tensor,  # [..., C]
    fc1_weight: Tensor,  # [H, C]
    fc1_bias: Tensor,  # [H]
    fc2_weight: Tensor,  # [C_out, H]
    fc2_bias: Tensor,  # [C_out]
    approximate: str,
) -> Tensor:
    """The definition."""
    h = F.gelu(F.linear(x, fc1_weight, fc1_bias), approximate=approximate)
    return F.linear(h, fc2_weight, fc2_bias)


class _Mlp(Function):
    @staticmethod
    def forward(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        approximate: str,
        save: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        return _fwd(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, save, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, fc1_weight, _, fc2_weight, _, approximate, _, impl = inputs
        _, z = output
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, fc1_weight, fc2_weight)
        ctx.approximate, ctx.impl = approximate, impl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        if dy is None:
            return (None,) * 8
        needs = list(ctx.needs_input_grad[:5])
        grads = _bwd(dy, *ctx.saved_tensors, ctx.approximate, needs, ctx.impl)
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*wanted, None, None, None)


def _fwd_fake(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    approximate: str,
    save: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], fc2_weight.shape[0])
    if not save:
        return y, x.new_empty(0)
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return y, x.new_empty(rows, fc1_weight.shape[0])


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    approximate: str,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    shapes = (x.shape, fc1_weight.shape, z.shape[1:], fc2_weight.shape, fc2_weight.shape[:1])
    return tuple(
        torch.empty(shape if need else (0,), dtype=x.dtype, device=x.device)
        for shape, need in zip(shapes, needs, strict=True)
    )


_fwd = dispatch.define(
    "mlp_fwd(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, "
    "str approximate, bool save, str impl) -> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "mlp_bwd(Tensor dy, Tensor x, Tensor z, Tensor fc1_weight, Tensor fc2_weight, "
    "str approximate, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
