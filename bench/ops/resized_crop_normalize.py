"""Inputs and work of resized_crop_normalize: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (T, H, W, box, size): a whole frame, a crop, a phone's video
SHAPES = [
    (8, 256, 340, (0, 0, 256, 340), (224, 224)),
    (16, 256, 340, (20, 40, 168, 224), (224, 224)),
    (8, 720, 1280, (0, 280, 720, 720), (224, 224)),
]
WRT = ()


def inputs(shape: tuple, dtype: torch.dtype) -> dict[str, Tensor | object]:
    """The arguments of the op, by name."""
    frames, height, width, box, size = shape
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (frames, height, width, 3), dtype=torch.uint8, generator=g)
    return {"frames": pixels, "box": box, "size": size, "dtype": dtype}


def work(shape: tuple, dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes: two bilinear passes over the pixels of the crop or, if more, the result."""
    frames, _, _, (_, _, height, width), size = shape
    pixels, results = frames * height * width, frames * size[0] * size[1]
    taps = max(2.0, 2 * width / size[1]), max(2.0, 2 * height / size[0])
    flops = 6 * (frames * size[0] * width * taps[1] + results * taps[0])
    return int(flops), 3 * (pixels + results * dtype.itemsize)


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_eager": 2.0}
