"""Rows of each sample by index, with an optional sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


def gather_tokens(
    x: Tensor,  # [B or 1, N, C]
    ids: Tensor,  # [B, M]
    *,
    add: Tensor | None = None,  # [B, M, C]
    impl: Impl | None = None,
) -> Tensor:
    """Take rows of each sample by index, and add a tensor to them.

    Equivalent to::

        y[b, m] = x[b, ids[b, m]] + add[b, m]   # x[0, ...] where x has one sample for all

    Args:
        x: Tokens, or a table of positions that all samples share. float32, bfloat16, float16
            (float64: reference).
        ids: Row indices, int32 or int64, in any order; a row may be taken more than once.
        add: Floating point; the sum is taken in float32 or wider and rounded once.
        impl: Implementation; None lets dispatch choose.

    Returns:
        [B, M, C] in the dtype that x and add promote to.

    Raises:
        ValueError: A shape does not fit, or an index is not in [0, N); on a GPU, where looking
            would wait, such an index gives a row of NaN.
        TypeError: x or add is not floating point, or ids is not int32 or int64.

    Saves ids alone for backward, which is a scatter-add that gives the same bits every time.
    Replaces boolean indexing, ``torch.gather`` with an expanded index, and the position table
    repeated over samples or layers.
    """
    _check(x, ids, add)
    dtype = x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)
    widest = add if add is not None and add.dtype == dtype else x
    name = dispatch.choose("gather_tokens", widest, impl)
    if name == "reference":
        return reference(x, ids, add)
    return _GatherTokens.apply(x, ids, add, name)  # type: ignore[no-any-return]


def reference(
    x: Tensor,  # [B or 1, N, C]
    ids: Tensor,  # [B, M]
    add: Tensor | None,  # [B, M, C]
) -> Tensor:
    """The definition."""
    x = x.expand(ids.shape[0], -1, -1)
    rows = x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))
    return rows if add is None else rows + add


def _check(x: Tensor, ids: Tensor, add: Tensor | None) -> None:
    op = "gather_tokens"
    for argument, value in (("x", x), ("add", add)):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{op}: {argument} must be floating point, got {value.dtype}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: ids must be int32 or int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{op}: ids must be [B, M], got {list(ids.shape)}")
    if x.dim() != 3 or x.shape[0] not in (1, ids.shape[0]):
        raise ValueError(f"{op}: x must be [{ids.shape[0]} or 1, N, C], got {list(x.shape)}")
    if add is not None and add.shape != (*ids.shape, x.shape[2]):
        expected = [*ids.shape, x.shape[2]]
        raise ValueError(f"{op}: add must be {expected}, got {list(add.shape)}")


class _GatherTokens(Function):
    @staticmethod
    def forward(x: Tensor, ids: Tensor, add: Tensor | None, impl: str) -> Tensor:
        return _fwd(x, ids, add, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ids, add, impl = inputs
        ctx.save_for_backward(ids)
        ctx.x_shape, ctx.x_dtype, ctx.impl = x.shape, x.dtype, impl
        ctx.add_dtype = None if add is None else add.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        need_dx, _, need_dadd, _ = ctx.needs_input_grad
        dx = None
        if need_dx:
            dx = _bwd(dy, ids, ctx.x_shape[0], ctx.x_shape[1], ctx.x_dtype, ctx.impl)
        return dx, None, dy.to(ctx.add_dtype) if need_dadd else None, None


def _fwd_fake(x: Tensor, ids: Tensor, add: Tensor | None, impl: str) -> Tensor:
    dtype = x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)
    return torch.empty(*ids.shape, x.shape[2], dtype=dtype, device=x.device)


def _bwd_fake(
    dy: Tensor, ids: Tensor, samples: int, tokens: int, x_dtype: torch.dtype, impl: str
) -> Tensor:
    return torch.empty(samples, tokens, dy.shape[2], dtype=x_dtype, device=dy.device)


_fwd = dispatch.define(
    "gather_tokens_fwd(Tensor x, Tensor ids, Tensor? add, str impl) -> Tensor", _fwd_fake
)
_bwd = dispatch.define(
    "gather_tokens_bwd(Tensor dy, Tensor ids, SymInt samples, SymInt tokens, ScalarType x_dtype, "
    "str impl) -> Tensor",
    _bwd_fake,
)
