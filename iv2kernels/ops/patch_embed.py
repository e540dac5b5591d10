"""Tubelets of visible tokens, embedded, with their positions and the CLS row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import dispatch
from iv2kernels.dispatch import Impl


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def patch_embed(video, weight, bias, *, pos_embed=None, cls_token=None, ids_keep=None, impl=None):
    return reference(video, weight, bias, pos_embed, cls_token, ids_keep)


def reference(video, weight, bias, pos_embed, cls_token, ids_keep):
    """The definition."""
    if video.dtype == torch.uint8:
        mean, std = video.new_tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float32)
        video = ((video.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    x = F.conv3d(video.to(weight.dtype), weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    first = 0 if cls_token is None else 1
    if pos_embed is not None:
        x = x + pos_embed[first:]
    if ids_keep is not None:
        x = x.gather(1, ids_keep.long()[..., None].expand(-1, -1, x.shape[-1]))
    if cls_token is not None:
        cls = cls_token if pos_embed is None else cls_token + pos_embed[0]
        x = torch.cat([cls.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
    return x.to(weight.dtype)
