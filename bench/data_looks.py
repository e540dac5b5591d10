"""Cut, resize, mirror and normalise the same frames: our one pass, torchvision v2, and PyTorch."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iv2.data.transforms import CropConfig, View, draw_view, look
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from iv2kernels.timing import interleaved, median_ratio

SIDE = 224


def with_torchvision(v2: Any, frames: Tensor, view: View) -> Tensor:  # [3, T, h, w]
    """As torchvision's manual has it: resized as uint8, then float."""
    video = v2.functional.resized_crop(
        frames.permute(0, 3, 1, 2), *view.box, list(view.size), antialias=True
    )
    if view.flip:
        video = v2.functional.horizontal_flip(video)
    video = v2.functional.to_dtype(video, torch.float32, scale=True)
    video = v2.functional.normalize(video, list(IMAGENET_MEAN), list(IMAGENET_STD))
    return video.transpose(0, 1).contiguous()


def with_pytorch(frames: Tensor, view: View) -> Tensor:  # [3, T, h, w]
    """The definition, in float32."""
    top, left, height, width = view.box
    video = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    video = F.interpolate(video, view.size, mode="bilinear", antialias=True, align_corners=False)
    if view.flip:
        video = video.flip(3)
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((video / 255 - mean) / deviation).transpose(0, 1).contiguous()


def torchvision_v2() -> tuple[Any, str]:
    """The module, or None and why."""
    try:
        return importlib.import_module("torchvision.transforms.v2"), ""
    except ModuleNotFoundError:
        return None, "not installed"
    except (ImportError, RuntimeError, OSError) as error:  # built for another PyTorch
        return None, f"cannot be imported: {str(error).splitlines()[0]}"


def looks(clips: list[Tensor], rounds: int) -> tuple[dict[str, dict[str, float]], str]:
    """Time each way on a drawn view of each clip.

    Args:
        clips: uint8 [T, H, W, 3] each.
        rounds: Turns of each way.

    Returns:
        By way: clips a second, how many times ours is faster, and the largest difference from ours
        in levels of 255; and why torchvision is not among them.
    """
    rng = np.random.default_rng(0)
    pairs = [
        (frames, draw_view(CropConfig("resized", SIDE), *frames.shape[1:3], rng))
        for frames in clips
    ]
    v2, reason = torchvision_v2()
    ways: dict[str, Callable[[Tensor, View], Tensor]] = {"fused": look, "PyTorch": with_pytorch}
    if v2:
        ways["torchvision v2"] = partial(with_torchvision, v2)

    def turn(way: Callable[[Tensor, View], Tensor]) -> list[Tensor]:
        return [way(frames, view) for frames, view in pairs]

    times = interleaved({name: partial(turn, way) for name, way in ways.items()}, 0, rounds)
    levels = 255 * torch.tensor(IMAGENET_STD)[:, None, None, None]
    ours = turn(look)
    rows = {}
    for name, way in ways.items():
        apart = [((a - b) * levels).abs().max() for a, b in zip(turn(way), ours, strict=True)]
        rows[name] = {
            "clips_per_s": len(clips) / statistics.median(times[name]),
            "x_fused": median_ratio(times[name], times["fused"]),
            "most_levels": float(max(apart)),
        }
    return rows, reason
