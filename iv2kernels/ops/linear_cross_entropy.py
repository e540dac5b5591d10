"""A linear layer and the cross-entropy of its outputs, without storing them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl
from iv2kernels.ops.linear import check_layer, under_autocast


def linear_cross_entropy(
    x: Tensor,  # [N, C]
    weight: Tensor,  # [V, C]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: Impl | None = None,
) -> Tensor:
    """Predict a token in every row and compare with the target.

    Equivalent to, the softmax in float32::

        logits = x @ weight.T + bias                                # [N, V]
        y = (1 - label_smoothing) * one_hot(target) + label_smoothing / V
        loss = mean or sum over rows of -(y * log_softmax(logits, -1)).sum(-1)

    over the rows whose target is not ignore_index. When every row is ignored the loss is 0 and so
    are its gradients (torch.nn.functional.cross_entropy gives NaN for the mean).

    Args:
        x: Hidden states. float32, bfloat16, float16 (float64: reference). Under autocast x, weight
            and bias are cast.
        weight: In x's dtype.
        target: Class of each row, int64.
        bias: In x's dtype, or None.
        ignore_index: Target of the rows that do not count.
        label_smoothing: Share of the target that is spread over all classes, 0 to 1.
        reduction: "mean" or "sum".
        impl: Implementation; None lets dispatch choose.

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError: x is not [N, C], weight not [V, C], bias not [V], target not [N] or (native) not
            in [0, V) nor ignore_index, label_smoothing not in [0, 1], or reduction neither "mean"
            nor "sum".
        TypeError: x is not floating point, dtypes differ outside autocast, or target is not int64.

    Ignored rows are dropped before anything is computed. The logits exist in chunks of rows of
    about 14 MiB, or of 64 rows if that is more. The gradients that are needed are found in the
    forward pass, while a chunk is there, which saves computing the logits twice: three GEMMs in
    all. dweight is accumulated in float32 and p - y is formed in float32; forward's extra memory is
    dx, that float32 dweight and about 16 MiB, and is held until backward, which writes the scaled
    gradients beside them. Between chunks, and in every sum over rows or classes, results do not
    depend on the number of threads; inside a GEMM that is oneDNN's or MKL's affair, which may split
    a long sum (dx sums over V) by threads.

    Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, arXiv:2411.09009;
    Szegedy et al., Rethinking the Inception Architecture (label smoothing), 2015, arXiv:1512.00567.
    """
    _check(x, weight, target, bias, label_smoothing, reduction)
    x, weight, bias = under_autocast(
        "linear_cross_entropy", {"x": x, "weight": weight, "bias": bias}
    )
    name = dispatch.choose("linear_cross_entropy", x, impl)
    if name == "reference":
        return reference(x, weight, target, bias, ignore_index, label_smoothing, reduction)
    grads = torch.is_grad_enabled()
    needs = tuple(grads and t is not None and t.requires_grad for t in (x, weight, bias))
    mean = reduction == "mean"
    out = _LinearCrossEntropy.apply(
        x, weight, bias, target, ignore_index, label_smoothing, mean, needs, name
    )
    return out[0]  # type: ignore[no-any-return]


def reference(
    x: Tensor,  # [N, C]
    weight: Tensor,  # [V, C]
    target: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The definition; the softmax in float32 (float64 for float64 inputs)."""
    logits = F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))
    total = F.cross_entropy(
        logits,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum().clamp_min(1)


def _check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    op = "linear_cross_entropy"
    check_layer(op, "weight", "bias", x, weight, bias)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [N, C], got {list(x.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {target.dtype}")
    if target.shape != x.shape[:1]:
        raise ValueError(f"{op}: target must be [{x.shape[0]}], got {list(target.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be mean or sum, got {reduction}")


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        label_smoothing: float,
        mean: bool,
        needs: tuple[bool, bool, bool],
        impl: str,
    ) -> tuple[Tensor, ...]:
        return _fwd(  # type: ignore[no-any-return]
            x, weight, bias, target, ignore_index, label_smoothing, mean, list(needs), impl
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, *units = output
        ctx.mark_non_differentiable(*units)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*units)
        ctx.impl = inputs[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dloss is None:
            return (None,) * 9
        grads = _bwd(dloss, *ctx.saved_tensors, ctx.impl)
        needs = ctx.needs_input_grad[:3]
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*wanted, *(None,) * 6)


def dweight_dtype(x: Tensor) -> torch.dtype:
    """What the gradient of the weight is kept in until backward.

    Chunks of rows add up in float32. The bfloat16 logits of no more rows than columns take no more
    memory than a bfloat16 gradient saves, and are one chunk.
    """
    one = x.dtype == torch.bfloat16 and x.shape[0] <= x.shape[1]
    return torch.bfloat16 if one else torch.float32


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, ...]:
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    return (
        loss,
        torch.empty(x.shape if needs[0] else (0,), dtype=x.dtype, device=x.device),
        loss.new_empty(weight.shape if needs[1] else (0,), dtype=dweight_dtype(x)),
        loss.new_empty(weight.shape[0] if needs[2] else 0),
        torch.empty_like(loss),
    )


def _bwd_fake(
    dloss: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor, unit: Tensor, impl: str
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(unit, dtype=dx.dtype) for unit in (dx, dweight, dbias))


_fwd = dispatch.define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    "int ignore_index, float label_smoothing, bool mean, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor dx, Tensor dweight, Tensor dbias, Tensor unit, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
