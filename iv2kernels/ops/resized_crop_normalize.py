"""Crop, resize, flip and normalise frames in one pass."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD

Interpolation = Literal["bilinear", "bicubic"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64)


def resized_crop_normalize(
    frames: Tensor,  # [T, H, W, 3]
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    *,
    flip: bool = False,
    interpolation: Interpolation = "bilinear",
    dtype: torch.dtype = torch.float32,
    impl: Impl | None = None,
) -> Tensor:
    """Cut a box out of frames, resize it with antialiasing, flip it and normalise it.

    Equivalent to::

        x = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
        x = interpolate(x, size, mode=interpolation, antialias=True).clamp(0, 255)
        x = x.flip(-1) if flip else x
        y = ((x / 255 - mean) / std).transpose(0, 1)   # ImageNet's

    Args:
        frames: Bytes, 0 to 255.
        box: (top, left, height, width) in pixels, inside the frame.
        size: (height, width) of the result.
        flip: Mirror left and right.
        interpolation: The filter; bicubic is Keys' with a = -0.5, as in PIL and in torch's
            antialiased resize.
        dtype: float32, bfloat16, float16 (float64: reference), or uint8, which rounds instead of
            normalising.
        impl: Implementation; None lets dispatch choose.

    Returns:
        [3, T, h, w] in dtype; [T, h, w, 3] for uint8. No gradient.

    Raises:
        ValueError: frames is not [T, H, W, 3], box is not inside the frame, size is not positive,
            or interpolation is unknown.
        TypeError: frames is not uint8, or dtype is none of these.

    Needs memory for some rows beside the result. Replaces torchvision's resized crop, flip, cast
    and normalisation, each a pass over the clip.

    Keys, Cubic convolution interpolation for digital image processing, 1981.
    """
    box, size = tuple(box), tuple(size)  # type: ignore[assignment]
    _check(frames, box, size, interpolation, dtype)
    limiting = frames.new_empty(0, dtype=dtype) if dtype == torch.float64 else frames
    name = dispatch.choose("resized_crop_normalize", limiting, impl)
    if name == "reference":
        return reference(frames, box, size, flip, interpolation, dtype)
    y: Tensor = _fwd(frames, box, size, flip, interpolation, dtype, name)
    return y


def reference(
    frames: Tensor,  # [T, H, W, 3]
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    flip: bool,
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The definition, in float32 (float64 for a float64 result)."""
    top, left, height, width = box
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).to(wide)
    x = F.interpolate(x, size=size, mode=interpolation, antialias=True).clamp(0, 255)
    x = x.flip(-1) if flip else x
    if dtype == torch.uint8:
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    table = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=wide, device=frames.device)
    mean, std = table[0].view(3, 1, 1), table[1].view(3, 1, 1)
    return ((x / 255 - mean) / std).transpose(0, 1).to(dtype).contiguous()


def _check(
    frames: Tensor,
    box: tuple[int, ...],
    size: tuple[int, ...],
    interpolation: str,
    dtype: torch.dtype,
) -> None:
    op = "resized_crop_normalize"
    if frames.dtype != torch.uint8:
        raise TypeError(f"{op}: frames must be uint8, got {frames.dtype}")
    if frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"{op}: frames must be [T, H, W, 3], got {list(frames.shape)}")
    if len(box) != 4 or len(size) != 2 or min(size) < 1:
        raise ValueError(
            f"{op}: box must be (top, left, height, width) and size (height, width), both "
            f"positive, got {box} and {size}"
        )
    top, left, height, width = box
    _, frame_height, frame_width, _ = frames.shape
    inside = top >= 0 and top + height <= frame_height and left >= 0 and left + width <= frame_width
    if not inside or height < 1 or width < 1:
        raise ValueError(
            f"{op}: box (top, left, height, width) must be inside the frame of "
            f"{frame_height} x {frame_width}, got {box}"
        )
    if interpolation not in get_args(Interpolation):
        raise ValueError(
            f"{op}: interpolation must be one of {', '.join(get_args(Interpolation))}, "
            f"got {interpolation}"
        )
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")


def _fwd_fake(
    frames: Tensor,
    box: list[int],
    size: list[int],
    flip: bool,
    mode: str,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    count = frames.shape[0]
    shape = (count, *size, 3) if dtype == torch.uint8 else (3, count, *size)
    return torch.empty(shape, dtype=dtype, device=frames.device)


_fwd = dispatch.define(
    "resized_crop_normalize_fwd(Tensor frames, SymInt[] box, SymInt[] size, bool flip, "
    "str interpolation, ScalarType dtype, str impl) -> Tensor",
    _fwd_fake,
)
