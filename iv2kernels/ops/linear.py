"""Linear layers on the fastest GEMM the machine has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def linear(
    x: Tensor,  # [..., C_in]
    weight: Tensor,  # [C_out, C_in]
    bias: Tensor | None = None,  # [C_out]
    *,
    impl: Impl | None = None,
) -> Tensor:
    """Multiply by a weight and add a bias: ``x @ weight.T + bias``.

    Args:
        x: float32, bfloat16, float16 (float64: reference). Under autocast all three are cast.
        weight: In x's dtype.
        bias: In x's dtype, or None.
        impl: Implementation; None lets dispatch choose. ``torch`` is torch's GEMM with less around
            it; float16 goes through float32 on a CPU without such a GEMM.

    Returns:
        [..., C_out] in x.dtype.

    Raises:
        ValueError: weight is not [C_out, C_in] or bias not [C_out].
        TypeError: x is not floating point, or dtypes differ outside autocast.

    Saves x and weight for backward. Replaces torch.nn.functional.linear.
    """
    check_layer("linear", "weight", "bias", x, weight, bias)
    x, weight, bias = under_autocast("linear", {"x": x, "weight": weight, "bias": bias})
    name = dispatch.choose("linear", x, impl)
    if name == "reference":
        return reference(x, weight, bias)
    return _Linear.apply(x, weight, bias, name)  # type: ignore[no-any-return]


def check_layer(
    op: str,
    weight_name: str,
    bias_name: str,
    x: Tensor,  # [..., C_in]
    weight: Tensor,  # [C_out, C_in]
    bias: Tensor | None,  # [C_out]
) -> None:
    """Raise unless weight and bias are those of a linear layer that takes x."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {weight_name} must be [C_out, {x.shape[-1] if x.dim() else 'C_in'}] for x "
            f"{list(x.shape)}, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {bias_name} must be [{weight.shape[0]}], got {list(bias.shape)}")


def under_autocast(op: str, tensors: dict[str, Tensor | None]) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on, as torch's own linear takes them.

    Raises:
        TypeError: autocast is off and a dtype differs from that of the first tensor.
    """
    x, *_ = tensors.values()
    assert x is not None
    # float64 is left alone by autocast
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(None if value is None else value.to(dtype) for value in tensors.values())
    for argument, value in tensors.items():
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{op}: {argument} must be {x.dtype}, like x, got {value.dtype}")
    return tuple(tensors.values())


def reference(
    x: Tensor,  # [..., C_in]
    weight: Tensor,  # [C_out, C_in]
    bias: Tensor | None,  # [C_out]
) -> Tensor:
    """The definition."""
    return torch.nn.functional.linear(x, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        return _fwd(x, weight, bias, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, impl = inputs
        ctx.save_for_backward(x, weight)
        ctx.impl, ctx.has_bias = impl, bias is not None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _bwd(
            dy, x, weight, [need_dx, need_dweight, need_dbias and ctx.has_bias], ctx.impl
        )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
        )


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if needs[1] else (0,), dtype=x.dtype, device=x.device),
        torch.empty(weight.shape[0] if needs[2] else 0, dtype=x.dtype, device=x.device),
    )


_fwd = dispatch.define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor", _fwd_fake
)
_bwd = dispatch.define(
    "linear_bwd(Tensor dy, Tensor x, Tensor weight, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
