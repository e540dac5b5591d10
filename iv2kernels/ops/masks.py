"""Which tokens the student sees: random, tube and attention-guided masks as index tensors.

Every mask is one weighted draw without replacement, an exponential race: token i gets the key
``-log2(u_i) / weight_i`` with u_i uniform in (0, 1), and the smallest keys are kept. The random
numbers are Philox4x32-10's, keyed by the sample's seed, so that a mask depends on the seed alone:
not on the batch, the worker, the device or the implementation, bit for bit. For that, the logarithm
is written out in float32 additions, multiplications and one division.

Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
Efraimidis & Spirakis, Weighted random sampling with a reservoir, 2006.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl

_WORD = 0xFFFFFFFF
# 2 / ((2 k + 1) ln 2) in float32: log2(m) = s (C0 + C1 s^2 + ...) with s = (m - 1) / (m + 1)
LOG2_COEFFICIENTS = (2.88539004, 0.961796701, 0.577078044, 0.412198603, 0.320598900)
_SQRT_HALF_BITS = 0x3F3504F3


def random_mask(
    seeds: Tensor,  # [B]
    num_tokens: int,
    num_keep: int,
    *,
    stream: int = 0,
    impl: Impl | None = None,
) -> Tensor:
    """Keep num_keep of num_tokens tokens of each sample, all subsets equally likely.

    Equivalent to ``attention_guided_mask`` with equal weights over the whole clip.

    Args:
        seeds: int64, one Philox key per sample.
        num_tokens: Patches of the sample, without the CLS row.
        num_keep: How many stay visible.
        stream: Separates independent draws for the same sample.
        impl: Implementation; None lets dispatch choose. All give the same bits.

    Returns:
        ids_keep: int32 [B, num_keep], sorted in each row, on the seeds' device.

    Raises:
        ValueError: seeds is not [B], or num_keep or stream is out of range.
        TypeError: seeds is not int64.

    Replaces a shuffle per sample in a Python loop.
    """
    return _draw("random_mask", seeds, None, num_tokens, num_keep, 1, stream, impl)


def tube_mask(
    seeds: Tensor,  # [B]
    num_frames: int,
    tokens_per_frame: int,
    keep_per_frame: int,
    *,
    stream: int = 0,
    impl: Impl | None = None,
) -> Tensor:
    """Keep the same random patches in every frame of a sample.

    Equivalent to ``random_mask(seeds, tokens_per_frame, keep_per_frame)``, repeated for each frame
    at an offset of tokens_per_frame.

    Args:
        seeds: int64, one Philox key per sample.
        num_frames: Frames (tubelets) T of the token grid.
        tokens_per_frame: Patches of a frame.
        keep_per_frame: How many stay visible in each.
        stream: Separates independent draws for the same sample.
        impl: Implementation; None lets dispatch choose. All give the same bits.

    Returns:
        ids_keep: int32 [B, num_frames * keep_per_frame], sorted in each row.

    Raises:
        ValueError: seeds is not [B], or num_frames, keep_per_frame or stream is out of range.
        TypeError: seeds is not int64.

    Tong et al., VideoMAE, 2022, arXiv:2203.12602.
    """
    if num_frames < 1:
        raise ValueError(f"tube_mask: num_frames must be at least 1, got {num_frames}")
    return _draw(
        "tube_mask", seeds, None, tokens_per_frame, keep_per_frame, num_frames, stream, impl
    )


def attention_guided_mask(
    seeds: Tensor,  # [B]
    weights: Tensor,  # [B, F, N]
    num_keep: int,
    *,
    stream: int = 0,
    impl: Impl | None = None,
) -> Tensor:
    """Draw num_keep visible tokens of each row by weight, without replacement.

    Equivalent, in distribution, to ``torch.multinomial(weights[b, f], num_keep)`` for every row,
    sorted, plus ``f * N``. A token of weight zero is drawn only when no other remains.

    Args:
        seeds: int64, one Philox key per sample.
        weights: Floating point, finite and not negative; they need not sum to one. One row per
            frame (F frames of N patches), or one row for the whole clip (F = 1).
        num_keep: How many stay visible in each row.
        stream: Separates independent draws for the same sample.
        impl: Implementation; None lets dispatch choose. All give the same bits.

    Returns:
        ids_keep: int32 [B, F * num_keep], sorted in each row of B, indices into F * N.

    Raises:
        ValueError: seeds is not [B], weights is not [B, F, N], on another device, negative or not
            finite (on a GPU, where looking would wait, all indices of such a row are -1), or
            num_keep or stream is out of range.
        TypeError: seeds is not int64, or weights not floating point.

    Replaces torch.multinomial and the boolean masks built from it. Weights get no gradient.

    Li et al., Unmasked Teacher, 2023, arXiv:2303.16058.
    """
    op = "attention_guided_mask"
    if weights.dim() != 3 or weights.shape[:1] != seeds.shape:
        raise ValueError(
            f"{op}: weights must be [B, F, N] with B like seeds {list(seeds.shape)}, "
            f"got {list(weights.shape)}"
        )
    if not weights.is_floating_point():
        raise TypeError(f"{op}: weights must be floating point, got {weights.dtype}")
    if weights.device != seeds.device:
        raise ValueError(
            f"{op}: weights must be on {seeds.device}, like seeds, got {weights.device}"
        )
    weights = weights.detach().float()
    return _draw(op, seeds, weights, weights.shape[2], num_keep, 1, stream, impl)


def _draw(
    op: str,
    seeds: Tensor,
    weights: Tensor | None,
    num_tokens: int,
    num_keep: int,
    repeat: int,
    stream: int,
    impl: Impl | None,
) -> Tensor:
    if seeds.dim() != 1:
        raise ValueError(f"{op}: seeds must be [B], got {list(seeds.shape)}")
    if seeds.dtype != torch.int64:
        raise TypeError(f"{op}: seeds must be int64, got {seeds.dtype}")
    keep = "keep_per_frame" if op == "tube_mask" else "num_keep"
    if not 0 <= num_keep <= num_tokens:
        raise ValueError(f"{op}: {keep} must be in [0, {num_tokens}], got {num_keep}")
    if not 0 <= stream < 2**63:
        raise ValueError(f"{op}: stream must be in [0, 2**63), got {stream}")
    name = dispatch.choose("masks", seeds, impl)
    if name == "reference":
        return reference(seeds, weights, num_tokens, num_keep, repeat, stream)
    return _masks_draw(seeds, weights, num_tokens, num_keep, repeat, stream, name)  # type: ignore[no-any-return]


def reference(
    seeds: Tensor,  # [B]
    weights: Tensor | None,  # [B, F, N]
    num_tokens: int,
    num_keep: int,
    repeat: int,
    stream: int,
) -> Tensor:
    """The definition: the num_keep smallest keys of each row, ties to the lower index."""
    rows = 1 if weights is None else weights.shape[1]
    keys = _keys(philox(seeds, stream, rows, num_tokens), weights)
    ids = keys.sort(dim=-1, stable=True).indices[..., :num_keep].sort(dim=-1).values
    frames = torch.arange(max(rows, repeat), device=seeds.device)[:, None] * num_tokens
    return (ids + frames).flatten(1).to(torch.int32)


def check_weights(weights: Tensor) -> None:
    """Raise unless all weights are finite and not negative."""
    good = (weights >= 0) & (weights < torch.inf)
    if not good.all():
        raise ValueError(
            "attention_guided_mask: weights must be finite and not negative, "
            f"got {weights[~good][0].item()}"
        )


def philox(seeds: Tensor, stream: int, rows: int, count: int) -> Tensor:
    """Random 32-bit words, int64 [B, rows, count].

    Word i of a row is word ``i % 4`` of the Philox block with the counter ``(i // 4, row, stream,
    stream >> 32)``; the key is the seed, low half first.
    """
    device = seeds.device
    counter = (
        torch.arange((count + 3) // 4, device=device),
        torch.arange(rows, device=device)[:, None],
        torch.full((1, 1), stream & _WORD, dtype=torch.int64, device=device),
        torch.full((1, 1), stream >> 32, dtype=torch.int64, device=device),
    )
    key = (seeds[:, None, None] & _WORD, (seeds[:, None, None] >> 32) & _WORD)
    return torch.stack(philox_rounds(counter, key), -1).flatten(2)[..., :count]


def philox_rounds(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ten rounds of Philox4x32 on 32-bit words held in int64."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap as 64 unsigned bits would
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _keys(words: Tensor, weights: Tensor | None) -> Tensor:
    """Race keys as integers in the order of the floats; weights of zero come after all others."""
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    times = minus_log2(uniform)
    if weights is None:
        return times.view(torch.int32).long()
    check_weights(weights)
    positive = (times / weights).view(torch.int32).long()
    return torch.where(weights > 0, positive, times.view(torch.int32).long() + 2**31)


def minus_log2(x: Tensor) -> Tensor:
    """-log2(x) of normal float32 numbers, the same bits everywhere."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23  # x = 2**exponent * m, m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    s = f / (f + 2.0)
    z = s * s
    c0, c1, c2, c3, c4 = LOG2_COEFFICIENTS
    p = z * c4 + c3
    p = p * z + c2
    p = p * z + c1
    p = p * z + c0
    return -(s * p + exponent.float())


def _draw_fake(
    seeds: Tensor,
    weights: Tensor | None,
    num_tokens: int,
    num_keep: int,
    repeat: int,
    *_: Any,
) -> Tensor:
    rows = repeat if weights is None else weights.shape[1]
    return torch.empty(seeds.shape[0], rows * num_keep, dtype=torch.int32, device=seeds.device)


_masks_draw = dispatch.define(
    "masks_draw(Tensor seeds, Tensor? weights, SymInt num_tokens, SymInt num_keep, SymInt repeat, "
    "int stream, str impl) -> Tensor",
    _draw_fake,
)
