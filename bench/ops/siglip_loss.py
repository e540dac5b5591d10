"""Inputs and work of siglip_loss: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.ops import contrastive_loss

SHAPES = contrastive_loss.SHAPES
GPU_SHAPES = contrastive_loss.GPU_SHAPES
WRT = ("v", "t", "scale", "bias")


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    named = contrastive_loss.inputs(shape, dtype)
    del named["temperature"]
    return named | {"scale": torch.tensor(10.0).to(dtype), "bias": torch.tensor(-10.0).to(dtype)}


work = contrastive_loss.work
backward_work = contrastive_loss.backward_work
