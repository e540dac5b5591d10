"""resized_crop_normalize on csrc/cpu/resized_crop_normalize.cpp."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD

_MEAN, _STD = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64)
_SCALE_SHIFT = torch.stack([1 / (255 * _STD), -_MEAN / _STD]).float()


def _bilinear(x: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.maximum(1 - np.abs(x), 0)
    return weights


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@functools.lru_cache(maxsize=256)
def _filters(
    size_in: int, size_out: int, interpolation: str, flip: bool
) -> tuple[Tensor, Tensor]:  # int32 [size_out], float32 [size_out, taps]
    """The first input under the filter of each output, and its weights.

    Windows are as wide as the widest and lie inside the input; weights outside a filter are zero.
    """
    shape, radius = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}[interpolation]
    stretch = max(size_in / size_out, 1.0)
    centre = size_in / size_out * (np.arange(size_out) + 0.5)
    begin = np.maximum((centre - radius * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + radius * stretch + 0.5).astype(np.int64), size_in)
    taps = int((end - begin).max())
    first = np.minimum(begin, size_in - taps)
    inputs = first[:, None] + np.arange(taps)
    weights = shape((inputs + 0.5 - centre[:, None]) / stretch)
    weights[(inputs < begin[:, None]) | (inputs >= end[:, None])] = 0
    weights /= weights.sum(1, keepdims=True)
    if flip:
        first, weights = first[::-1], weights[::-1]
    return (
        torch.from_numpy(first.astype(np.int32)),
        torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32)),
    )


def resized_crop_normalize_fwd(
    frames: Tensor,
    box: list[int],
    size: list[int],
    flip: bool,
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """See csrc/kernels.h: ResizedCropNormalizeFwd."""
    top, left, crop_height, crop_width = box
    count, height, width = frames.shape[0], *size
    shape = (count, height, width, 3) if dtype == torch.uint8 else (3, count, height, width)
    out = torch.empty(shape, dtype=dtype)
    crop = frames[:, top : top + crop_height, left : left + crop_width]
    if crop.stride(3) != 1 or crop.stride(2) != 3:
        crop = crop.contiguous()
    y_first, y_weights = _filters(crop_height, height, interpolation, False)
    x_first, x_weights = _filters(crop_width, width, interpolation, flip)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, 3 * crop_width + 1 + 5 * width)
    if out.numel():
        _C.resized_crop_normalize_fwd(
            ptr(crop),
            ptr(y_first),
            ptr(y_weights),
            ptr(x_first),
            ptr(x_weights),
            ptr(_SCALE_SHIFT),
            ptr(out),
            ptr(scratch),
            count,
            height,
            width,
            crop_width,
            y_weights.shape[1],
            x_weights.shape[1],
            crop.stride(0),
            crop.stride(1),
            DTYPE[dtype],
            threads,
        )
    return out
