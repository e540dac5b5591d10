"""Which part of a video is looked at: crop boxes, flips, and views for testing.

Nothing here touches a pixel: a view is a box in source pixels, and `look` hands it to one call of
`iv2kernels.resized_crop_normalize`, which cuts, resizes, flips and normalises in one pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iv2.data.clips import sparse_test_indices
from iv2.data.decode import Video

Interpolation = Literal["bilinear", "bicubic"]
CropKind = Literal["multiscale", "resized", "centre", "whole"]


class Box(NamedTuple):
    """A rectangle in source pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """What is seen of a clip: a rectangle, perhaps mirrored, at a size."""

    box: Box
    size: tuple[int, int]  # height, width in pixels
    flip: bool = False
    interpolation: Interpolation = "bilinear"


@dataclass(frozen=True)
class CropConfig:
    """How clips are cut for training and evaluation."""

    # multiscale (stage 1), resized (a random resized crop: stage 2, fine-tuning), centre, or whole
    kind: CropKind = "multiscale"
    # height and width of the result, pixels
    size: int = 224
    # resized: smallest and largest part of the area
    scale: tuple[float, float] = (0.08, 1.0)
    # resized: smallest and largest width / height
    ratio: tuple[float, float] = (0.75, 4 / 3)
    # probability of mirroring left and right
    flip: float = 0.5
    # bilinear or bicubic
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.kind not in ("multiscale", "resized", "centre", "whole"):
            raise ValueError(
                f"CropConfig: kind must be multiscale, resized, centre or whole, got {self.kind!r}"
            )
        if self.size < 1:
            raise ValueError(f"CropConfig: size must be at least 1, got {self.size}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"CropConfig: flip must be in [0, 1], got {self.flip}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"CropConfig: scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"CropConfig: ratio must be 0 < low <= high, got {self.ratio}")


def draw_view(
    config: CropConfig, height: int, width: int, rng: np.random.Generator, *, may_flip: bool = True
) -> View:
    """One view of a height x width clip, shared by all its frames.

    Args:
        config: What to draw. The kinds `centre` and `whole` draw only the flip.
        height: Of the source, pixels.
        width: Of the source, pixels.
        rng: Source of the draws; the flip is always drawn first.
        may_flip: False where mirroring would change the meaning.
    """
    flip = bool(rng.random() < config.flip) and may_flip
    if config.kind == "multiscale":
        box = multi_scale_crop(height, width, config.size, rng)
    elif config.kind == "resized":
        box = random_resized_crop(height, width, rng, scale=config.scale, ratio=config.ratio)
    elif config.kind == "centre":
        box = sliding_crops(height, width, 1)[0]
    else:
        box = Box(0, 0, height, width)
    return View(box, (config.size, config.size), flip, config.interpolation)


def look(frames: Tensor, view: View, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cut, resize, flip and normalise.

    Args:
        frames: uint8 [T, H, W, 3].
        view: What to take.
        dtype: Of the result; torch.uint8 leaves out the normalisation.

    Returns:
        [3, T, h, w], or uint8 [T, h, w, 3].
    """
    from iv2kernels import resized_crop_normalize

    return resized_crop_normalize(
        frames,
        view.box,
        view.size,
        flip=view.flip,
        interpolation=view.interpolation,
        dtype=dtype,
    )


def multi_scale_crop(
    height: int,
    width: int,
    size: int,
    rng: np.random.Generator,
    *,
    scales: Sequence[float] = (1.0, 0.875, 0.75, 0.66),
    max_distort: int = 1,
) -> Box:
    """Stage 1: height and width from a few scales of the short side, at one of 13 places.

    Height and width are drawn together from the pairs of scales at most `max_distort` apart in the
    list; a side within two pixels of `size` becomes `size`. The places are the corners, the centre,
    the middles of the edges, and the centres of the quarters.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [min(size, height, width) if abs(side - size) < 3 else max(1, side) for side in sides]
    count = len(sides)
    pairs = [
        (sides[i], sides[j])
        for i in range(count)
        for j in range(count)
        if abs(i - j) <= max_distort
    ]
    high, wide = pairs[int(rng.random() * len(pairs))]
    row, column = _PLACES[int(rng.random() * len(_PLACES))]
    return Box(row * ((height - high) // 4), column * ((width - wide) // 4), high, wide)


# Quarters of the free space, (row, column).
_PLACES = (
    *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
    *((2, 0), (2, 4), (4, 2), (0, 2)),
    *((1, 1), (1, 3), (3, 1), (3, 3)),
)


def random_resized_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
) -> Box:
    """Stage 2 and fine-tuning: a part of the area with a drawn shape, anywhere.

    The area is uniform in `scale`, the width / height log-uniform in `ratio`. When ten draws do not
    fit, the largest centred rectangle with a permitted ratio is taken.
    """
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        shape = math.exp(low + (high - low) * rng.random())
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            top = int(rng.random() * (height - tall + 1))
            left = int(rng.random() * (width - wide + 1))
            return Box(top, left, tall, wide)
    wide = min(width, max(1, round(height * ratio[1])))
    tall = min(height, max(1, round(width / ratio[0])))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


def sliding_crops(height: int, width: int, num_crops: int, *, zoom: float = 1.0) -> list[Box]:
    """Test: square windows spread evenly along the long side; one is centred.

    Args:
        height: Of the source, pixels.
        width: Of the source, pixels.
        num_crops: Number of windows.
        zoom: Short side over the side of the window: 256 / 224 for "resize to 256, cut 224".
    """
    if num_crops < 1:
        raise ValueError(f"sliding_crops: num_crops must be at least 1, got {num_crops}")
    if zoom < 1:
        raise ValueError(f"sliding_crops: zoom must be at least 1, got {zoom}")
    side = max(1, round(min(height, width) / zoom))
    boxes = []
    for k in range(num_crops):
        place = k / (num_crops - 1) if num_crops > 1 else 0.5
        along, across = int((max(height, width) - side) * place), (min(height, width) - side) // 2
        top, left = (along, across) if height > width else (across, along)
        boxes.append(Box(top, left, side, side))
    return boxes


def multi_view(
    video: Video,
    num_frames: int,
    size: int,
    *,
    num_segments: int = 4,
    num_crops: int = 3,
    zoom: float = 1.0,
    interpolation: Interpolation = "bilinear",
    frame_range: tuple[int, int] | None = None,
) -> Tensor:  # [num_segments * num_crops, 3, T, size, size]
    """All test views of a video from one decode, segment by segment.

    Args:
        video: The open video.
        num_frames: Frames in a view.
        size: Side of a view, pixels.
        num_segments: Views in time, by `sparse_test_indices`.
        num_crops: Views in space, by `sliding_crops`.
        zoom: Short side over the side of the window.
        interpolation: Of the resize.
        frame_range: Frames [low, high) of the video that are the clip; None: all.

    Raises:
        DecodeError: the video is damaged.
    """
    low, high = frame_range or (0, video.num_frames)
    times = [
        sparse_test_indices(high - low, num_frames, segment, num_segments)
        for segment in range(num_segments)
    ]
    unique = sorted({i for segment in times for i in segment})
    frames = video.frames([low + i for i in unique])
    rows = torch.tensor([[unique.index(i) for i in segment] for segment in times])
    crops = []
    for box in sliding_crops(frames.shape[1], frames.shape[2], num_crops, zoom=zoom):
        seen = look(frames, View(box, (size, size), interpolation=interpolation))  # [3, U, h, w]
        crops.append(seen[:, rows].transpose(0, 1))  # [num_segments, 3, T, h, w]
    return torch.stack(crops, 1).flatten(0, 1)
