"""Crop, resize, flip and normalise frames in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl


from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD


def resized_crop_normalize(frames, box, size, *, flip=False, interpolation="bilinear", dtype=torch.float32, impl=None):
    return reference(frames, box, size, flip, interpolation, dtype)


def reference(frames, box, size, flip, interpolation, dtype):
    """The definition."""
    top, left, height, width = box
    x = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=size, mode=interpolation, antialias=True, align_corners=False).clamp(0, 255)
    x = x.flip(-1) if flip else x
    if dtype == torch.uint8:
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    return ((x / 255 - mean) / std).transpose(0, 1).to(dtype).contiguous()
