"""Tubelets of visible tokens, embedded, with their positions and the CLS row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Function, Impl

# Of red, green and blue, as fractions of 255.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patch_embed(
    video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
    weight: Tensor,  # [C, 3, t, p, p]
    bias: Tensor | None,  # [C]
    *,
    pos_embed: Tensor | None = None,  # [(1+)N, C]
    cls_token: Tensor | None = None,  # [C]
    ids_keep: Tensor | None = None,  # [B, N_keep]
    impl: Impl | None = None,
) -> Tensor:
    """Embed the visible tubelets of a video, add their positions, prepend the CLS token.

    Equivalent to::

        x = conv3d(video, weight, bias, stride=(t, p, p)).flatten(2).transpose(1, 2)  # [B, N, C]
        x = (x + pos_embed[1:])[:, ids_keep]                                # per sample
        x = cat([cls_token + pos_embed[0], x], 1)

    where only the tokens of ids_keep are computed.

    Args:
        video: Bytes, which are normalised with ImageNet's mean and standard deviation, or floating
            point, normalised. Only the innermost strides must be natural: every other frame of a
            clip is no copy.
        weight: Of the convolution, whose stride is its kernel. float32, bfloat16, float16
            (float64: reference).
        bias: Of the convolution, or None.
        pos_embed: Position table, any floating dtype, with the CLS row first iff cls_token is
            given.
        cls_token: Prepended to each sample.
        ids_keep: Patch indices, int32 or int64, time-major, then row, then column, without the CLS
            row; None keeps all N.
        impl: Implementation; None lets dispatch choose.

    Returns:
        [B, (1+)N_keep, C] in weight.dtype.

    Raises:
        ValueError: A shape does not fit, tubelets do not divide the video, or an index is not in
            [0, N); on a GPU, where looking would wait, such an index gives a row of NaN.
        TypeError: video is neither bytes nor floating point, or ids_keep not int32 or int64.

    Saves video, weight and ids_keep for backward, which copies the tubelets again. Replaces
    torch.nn.Conv3d on all tokens, of which four in five are then dropped.

    Dosovitskiy et al., An Image is Worth 16x16 Words, 2021, arXiv:2010.11929.
    """
    _check(video, weight, bias, pos_embed, cls_token, ids_keep)
    name = dispatch.choose("patch_embed", weight, impl)
    if name == "reference":
        return reference(video, weight, bias, pos_embed, cls_token, ids_keep)
    args = (video, weight, bias, pos_embed, cls_token, ids_keep)
    y: Tensor = _PatchEmbed.apply(*args, name)
    return y


def reference(
    video: Tensor,  # uint8 [B, T, H, W, 3] | float [B, 3, T, H, W]
    weight: Tensor,  # [C, 3, t, p, p]
    bias: Tensor | None,  # [C]
    pos_embed: Tensor | None,  # [(1+)N, C]
    cls_token: Tensor | None,  # [C]
    ids_keep: Tensor | None,  # [B, N_keep]
) -> Tensor:
    """The definition."""
    if video.dtype == torch.uint8:
        video = normalize(video).permute(0, 4, 1, 2, 3)
    video, bias = video.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    x: Tensor = F.conv3d(video, weight, bias, stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2)
    first = 0 if cls_token is None else 1
    if pos_embed is not None:
        x = x + pos_embed[first:]
    if ids_keep is not None:
        x = x.gather(1, ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))
    if cls_token is not None:
        cls = cls_token if pos_embed is None else cls_token + pos_embed[0]
        x = torch.cat([cls.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
    return x.to(weight.dtype)


def normalize(pixels: Tensor) -> Tensor:  # [..., 3] of bytes -> float32
    """What a byte of each channel stands for."""
    table = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=pixels.device)
    return (pixels.float() / 255 - table[0]) / table[1]


def grid_of(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Tubelets in time, rows of patches, patches in a row."""
    _, _, t, p, _ = weight.shape
    frames, height, width = video.shape[1:4] if video.dtype == torch.uint8 else video.shape[2:]
    return frames // t, height // p, width // p


def _check(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    ids_keep: Tensor | None,
) -> None:
    op = "patch_embed"
    if not (video.dtype == torch.uint8 or video.is_floating_point()):
        raise TypeError(f"{op}: video must be uint8 or floating point, got {video.dtype}")
    if not weight.is_floating_point():
        raise TypeError(f"{op}: weight must be floating point, got {weight.dtype}")
    if weight.dim() != 5 or weight.shape[1] != 3 or weight.shape[3] != weight.shape[4]:
        raise ValueError(f"{op}: weight must be [C, 3, t, p, p], got {list(weight.shape)}")
    axis = 4 if video.dtype == torch.uint8 else 1
    if video.dim() != 5 or video.shape[axis] != 3:
        expected = "[B, T, H, W, 3]" if axis == 4 else "[B, 3, T, H, W]"
        raise ValueError(f"{op}: video must be {expected}, got {list(video.shape)}")
    sides = video.shape[1:4] if axis == 4 else video.shape[2:]
    for side, size, patch in zip(("T", "H", "W"), sides, weight.shape[2:], strict=True):
        if size % patch:
            raise ValueError(f"{op}: {side} of video must be a multiple of {patch}, got {size}")
    frames, rows, columns = grid_of(video, weight)
    tokens = (0 if cls_token is None else 1) + frames * rows * columns
    dim = weight.shape[0]
    for argument, value, shape in (
        ("bias", bias, [dim]),
        ("cls_token", cls_token, [dim]),
        ("pos_embed", pos_embed, [tokens, dim]),
    ):
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{op}: {argument} must be {shape}, got {list(value.shape)}")
    if ids_keep is None:
        return
    if ids_keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: ids_keep must be int32 or int64, got {ids_keep.dtype}")
    if ids_keep.dim() != 2 or ids_keep.shape[0] != video.shape[0]:
        raise ValueError(
            f"{op}: ids_keep must be [{video.shape[0]}, N_keep], got {list(ids_keep.shape)}"
        )


class _PatchEmbed(Function):
    @staticmethod
    def forward(
        video: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_embed: Tensor | None,
        cls_token: Tensor | None,
        ids_keep: Tensor | None,
        impl: str,
    ) -> Tensor:
        return _fwd(video, weight, bias, pos_embed, cls_token, ids_keep, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        video, weight, bias, pos_embed, cls_token, ids_keep, impl = inputs
        ctx.save_for_backward(video, weight, ids_keep)
        ctx.has_cls, ctx.impl = cls_token is not None, impl
        ctx.dtypes = [None if x is None else x.dtype for x in (bias, pos_embed, cls_token)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        video, weight, ids_keep = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        pos_dtype = ctx.dtypes[1] or torch.float32
        grads = _bwd(dy, video, weight, ids_keep, ctx.has_cls, pos_dtype, needs, ctx.impl)
        dvideo, dweight, dbias, dpos_embed, dcls_token = (
            grad if need else None for grad, need in zip(grads, needs, strict=True)
        )
        if dbias is not None:
            dbias = dbias.to(ctx.dtypes[0])
        if dcls_token is not None:
            dcls_token = dcls_token.to(ctx.dtypes[2])
        return dvideo, dweight, dbias, dpos_embed, dcls_token, None, None


def _fwd_fake(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    ids_keep: Tensor | None,
    impl: str,
) -> Tensor:
    frames, rows, columns = grid_of(video, weight)
    keep = frames * rows * columns if ids_keep is None else ids_keep.shape[1]
    first = 0 if cls_token is None else 1
    return torch.empty(
        video.shape[0], first + keep, weight.shape[0], dtype=weight.dtype, device=video.device
    )


def _bwd_fake(
    dy: Tensor,
    video: Tensor,
    weight: Tensor,
    ids_keep: Tensor | None,
    has_cls: bool,
    pos_dtype: torch.dtype,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    frames, rows, columns = grid_of(video, weight)
    dim = weight.shape[0]
    shapes = (
        (video.shape, video.dtype),
        (weight.shape, weight.dtype),
        ((dim,), torch.float32),
        ((int(has_cls) + frames * rows * columns, dim), pos_dtype),
        ((dim,), torch.float32),
    )
    grads = [
        torch.empty(shape if need else (0,), dtype=dtype, device=dy.device)
        for (shape, dtype), need in zip(shapes, needs, strict=True)
    ]
    return grads[0], grads[1], grads[2], grads[3], grads[4]


_fwd = dispatch.define(
    "patch_embed_fwd(Tensor video, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? cls_token, Tensor? ids_keep, str impl) -> Tensor",
    _fwd_fake,
)
_bwd = dispatch.define(
    "patch_embed_bwd(Tensor dy, Tensor video, Tensor weight, Tensor? ids_keep, bool has_cls, "
    "ScalarType pos_dtype, bool[] needs, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
