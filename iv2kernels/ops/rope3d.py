"""Rotary position embedding by time, row and column of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl


@dataclass(frozen=True, eq=False)
class Rope3d:
    """Where tokens lie, and how fast the angles fall.

    Attributes:
        grid: Tokens of the clip as (T, H, W), in this order, time first.
        ids: [B, M] int32 or int64, which tokens of the grid are there (visible tokens of a mask);
            None: all of them, in order.
        cls_token: A CLS token comes first, which is not rotated.
        theta: Base of the frequencies.

    Raises:
        ValueError: grid is not three positive numbers, ids not [B, M], or theta not positive.
        TypeError: ids is not int32 or int64.
    """

    grid: tuple[int, int, int]
    ids: Tensor | None = None  # [B, M]
    cls_token: bool = False
    theta: float = 10000.0

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"Rope3d: grid must be (T, H, W), each at least 1, got {self.grid}")
        if not self.theta > 0:
            raise ValueError(f"Rope3d: theta must be positive, got {self.theta}")
        if self.ids is None:
            return
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"Rope3d: ids must be int32 or int64, got {self.ids.dtype}")
        if self.ids.dim() != 2:
            raise ValueError(f"Rope3d: ids must be [B, M], got {list(self.ids.shape)}")


def rope3d(
    x: Tensor,  # [B, N, heads, head_dim]
    rope: Rope3d,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """Rotate the channels of each head by angles that tell where a token lies.

    Then a score q · k depends on the distance of two tokens in time, rows and columns. Equivalent
    to, with pair i made of the channels i and i + head_dim / 2, and the pairs divided among time,
    rows and columns as ``axis_pairs`` says::

        angle = position * theta ** (-i_axis / pairs_axis)   # i_axis counts within its axis
        y_i, y_j = x_i cos - x_j sin, x_j cos + x_i sin      # j = i + head_dim / 2

    Pairs half a head apart are GPT-NeoX's and Qwen2-VL's; frequencies start anew at each axis as in
    V-JEPA 2. Models whose pairs are neighbours differ by a fixed order of channels.

    Args:
        x: Queries or keys; views of a packed qkv are read in place. float32, bfloat16, float16
            (float64: reference).
        rope: The grid, which of its tokens are there, and theta.
        impl: Implementation; None lets dispatch choose.

    Returns:
        y like x, contiguous; computed in float32 and rounded once.

    Raises:
        ValueError: x is not [B, N, heads, head_dim] with an even head_dim of at most 512 (at least
            6), N is not the number of tokens of rope, or (native) ids are not in [0, T * H * W).
        TypeError: x is not floating point.

    Saves only ids for backward, which rotates back.

    Su et al., RoFormer, 2021, arXiv:2104.09864; Assran et al., V-JEPA 2, 2025, arXiv:2506.09985;
    Wang et al., Qwen2-VL, 2024, arXiv:2409.12191.
    """
    check(x, rope)
    name = dispatch.choose("rope3d", x, impl)
    if name == "reference":
        return reference(x, rope)
    return _Rope3d.apply(x, rope.ids, list(rope.grid), rope.cls_token, rope.theta, name)  # type: ignore[no-any-return]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Pairs of channels for time, rows and columns: a third each, what is left to time."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def axis_angles(size: int, pairs: int, theta: float) -> Tensor:
    """Angles [size, pairs] of the positions along an axis, float64."""
    falling = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.arange(size, dtype=torch.float64)[:, None] * falling


def reference(
    x: Tensor,  # [B, N, heads, head_dim]
    rope: Rope3d,
) -> Tensor:
    """The definition."""
    pairs = axis_pairs(x.shape[-1])
    T, H, W = rope.grid
    ids = torch.arange(T * H * W)[None] if rope.ids is None else rope.ids.cpu().long()
    places = (ids // (H * W), ids // W % H, ids % W)
    sides = zip(rope.grid, pairs, places, strict=True)
    angles = torch.cat([axis_angles(n, p, rope.theta)[at] for n, p, at in sides], -1)
    if rope.cls_token:
        angles = torch.cat([torch.zeros_like(angles[:, :1]), angles], 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (a[:, :, None].to(x.device, wide) for a in (angles.cos(), angles.sin()))
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def check(x: Tensor, rope: Rope3d) -> None:
    """Raise unless x and rope fit together."""
    if not x.is_floating_point():
        raise TypeError(f"rope3d: x must be floating point, got {x.dtype}")
    if x.dim() != 4 or x.shape[3] % 2 or not 6 <= x.shape[3] <= 512:
        raise ValueError(
            "rope3d: x must be [B, N, heads, head_dim] with an even head_dim from 6 to 512, "
            f"got {list(x.shape)}"
        )
    T, H, W = rope.grid
    tokens = int(rope.cls_token) + (T * H * W if rope.ids is None else rope.ids.shape[1])
    if x.shape[1] != tokens:
        raise ValueError(f"rope3d: x must have the {tokens} tokens of rope, got {x.shape[1]}")
    if rope.ids is not None and rope.ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"rope3d: ids must be of {x.shape[0]} samples like x, got {rope.ids.shape[0]}"
        )


class _Rope3d(Function):
    @staticmethod
    def forward(
        x: Tensor, ids: Tensor | None, grid: list[int], cls_token: bool, theta: float, impl: str
    ) -> Tensor:
        return _fwd(x, ids, grid, cls_token, theta, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ids, *ctx.options = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        return (_bwd(dy, ids, *ctx.options), *(None,) * 5)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_fwd = dispatch.define(
    "rope3d_fwd(Tensor x, Tensor? ids, int[] grid, bool cls_token, float theta, str impl) "
    "-> Tensor",
    _fake,
)
_bwd = dispatch.define(
    "rope3d_bwd(Tensor dy, Tensor? ids, int[] grid, bool cls_token, float theta, str impl) "
    "-> Tensor",
    _fake,
)
