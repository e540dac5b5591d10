"""Hard negatives: for each row and direction one other row, drawn by softmax similarity."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl
from iv2kernels.ops.masks import minus_log2, philox

# Apart from the streams of the masks, which use the same seeds.
STREAM = 0x6E656773 << 32


def hard_negatives(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    temperature: float | Tensor,  # []
    ids: Tensor | None,  # [B]
    seeds: Tensor,  # [B]
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a negative text for each video, and a negative video for each text.

    Equivalent, in distribution, to::

        p = exp(v @ t.T / temperature)
        p[ids[:, None] == ids] = 0                      # the diagonal without ids
        neg_t = torch.multinomial(p, 1)                 # -1 where a row has no other id
        neg_v = torch.multinomial(p.T, 1)

    The draw is Gumbel's: the largest of score + noise, with the noise of row i the Philox words of
    seeds[i]. A draw depends on the seeds and the batch, not on the implementation or the number of
    threads; between implementations it may differ only where two sums agree to float32 rounding.

    Args:
        v: Features of the videos, as compared, usually of length one; any floating dtype, taken in
            float32 (float64: reference). They get no gradient.
        t: Features of the texts; row i belongs to row i of v.
        temperature: Divisor of the similarities, positive.
        ids: int64; rows with the same id are never each other's negative. None: all differ.
        seeds: int64, one Philox key per row.
        impl: Implementation; None lets dispatch choose.

    Returns:
        neg_t, the row of t for each row of v, and neg_v, the row of v for each row of t; int32 [B],
        -1 for a row whose id all rows have.

    Raises:
        ValueError: v is not [B, D], t not shaped like it or elsewhere, ids or seeds is not [B],
            temperature is not a positive number or [], or v or t is not finite.
        TypeError: v, t or temperature is not floating point, or ids or seeds is not int64.

    Needs memory for a copy of v and t, never [B, B]. Replaces the softmax, fill and multinomial of
    InternVideo2's video-text matching.

    Li et al., Align before Fuse, 2021, arXiv:2107.07651; Gumbel, 1954.
    """
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(temperature, dtype=torch.float64)
    _check(v, t, temperature, ids, seeds)
    v, t, temperature = v.detach(), t.detach(), temperature.detach()
    name = dispatch.choose("hard_negatives", v, impl)
    if name == "reference":
        return reference(v, t, temperature, ids, seeds)
    return _hard_negatives_draw(v, t, temperature, ids, seeds, name)  # type: ignore[no-any-return]


def reference(
    v: Tensor,  # [B, D]
    t: Tensor,  # [B, D]
    temperature: Tensor,  # []
    ids: Tensor | None,  # [B]
    seeds: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """The definition; scores and noise are in units of ln 2."""
    check_values(v, t, temperature)
    batch, wide = v.shape[0], torch.promote_types(v.dtype, torch.float32)
    scores = v.to(wide) @ t.to(wide).T * (math.log2(math.e) / temperature.item())
    ids = torch.arange(batch, device=v.device) if ids is None else ids
    same = ids[:, None] == ids
    alone = same.all(1)
    noise = gumbel(seeds, batch)

    def draw(scores: Tensor, noise: Tensor) -> Tensor:
        keys = (scores + noise).masked_fill(same, -torch.inf)
        best = keys.argmax(1) if batch else keys.new_zeros(0, dtype=torch.int64)
        return best.masked_fill(alone, -1).int()

    return draw(scores, noise[:, 0]), draw(scores.T, noise[:, 1])


def gumbel(seeds: Tensor, count: int) -> Tensor:
    """Gumbel noise divided by ln 2, less a constant: float32 [B, 2, count], v -> t first."""
    uniform = ((philox(seeds, STREAM, 2, count) >> 9).float() + 0.5) * 2.0**-23
    return minus_log2(minus_log2(uniform))


def check_values(v: Tensor, t: Tensor, temperature: Tensor) -> None:
    """Raise unless features are finite and the temperature is positive."""
    for argument, x in (("v", v), ("t", t)):
        finite = x.isfinite()
        if not finite.all():
            bad = x[~finite][0].item()
            raise ValueError(f"hard_negatives: {argument} must be finite, got {bad}")
    value = temperature.item()
    if not 0 < value < math.inf:
        raise ValueError(f"hard_negatives: temperature must be positive, got {value}")


def _check(v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None, seeds: Tensor) -> None:
    for argument, x in (("v", v), ("t", t), ("temperature", temperature)):
        if not x.is_floating_point():
            raise TypeError(f"hard_negatives: {argument} must be floating point, got {x.dtype}")
    if v.dim() != 2:
        raise ValueError(f"hard_negatives: v must be [B, D], got {list(v.shape)}")
    if t.shape != v.shape:
        raise ValueError(f"hard_negatives: t must be {list(v.shape)} like v, got {list(t.shape)}")
    if temperature.dim() != 0:
        raise ValueError(
            f"hard_negatives: temperature must be a number or [], got {list(temperature.shape)}"
        )
    for argument, value in (("t", t), ("ids", ids), ("seeds", seeds)):
        if value is None:
            continue
        if value.device != v.device:
            raise ValueError(
                f"hard_negatives: {argument} must be on {v.device} like v, got {value.device}"
            )
        if argument == "t":
            continue
        if value.dtype != torch.int64:
            raise TypeError(f"hard_negatives: {argument} must be int64, got {value.dtype}")
        if value.shape != v.shape[:1]:
            raise ValueError(
                f"hard_negatives: {argument} must be [{v.shape[0]}], got {list(value.shape)}"
            )


def _draw_fake(v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    neg_t = torch.empty(v.shape[0], dtype=torch.int32, device=v.device)
    return neg_t, torch.empty_like(neg_t)


_hard_negatives_draw = dispatch.define(
    "hard_negatives_draw(Tensor v, Tensor t, Tensor temperature, Tensor? ids, Tensor seeds, "
    "str impl) -> (Tensor, Tensor)",
    _draw_fake,
)
