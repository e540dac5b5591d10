"""Inputs and work of contrastive_loss: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# (B, D): global batches of stage 2, of its contrastive width and CLIP's
SHAPES = [(1024, 512), (4096, 512), (4096, 768)]
GPU_SHAPES = [(4096, 768), (16384, 768)]
WRT = ("v", "t", "temperature")


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    rows, width = shape
    g = torch.Generator().manual_seed(0)
    # as alike as in training: a direction that all share, and one of each pair
    pair = torch.randn(rows, width, generator=g) + 0.5 * torch.randn(width, generator=g)
    v, t = (F.normalize(pair + torch.randn(rows, width, generator=g), dim=-1) for _ in range(2))
    return {
        "v": v.to(dtype),
        "t": t.to(dtype),
        "temperature": torch.tensor(0.07).to(dtype),
        # every fourth row or so has a twin
        "ids": torch.randint(max(1, 4 * rows), (rows,), generator=g),
    }


def work(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass; backward has three products more."""
    rows, width = shape
    return 2 * rows * rows * width, 2 * rows * width * dtype.itemsize


def backward_work(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """The scores again, and a product for each gradient."""
    rows, width = shape
    return 6 * rows * rows * width, 4 * rows * width * dtype.itemsize


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    if shape == (4096, 512) and dtype == "float32":
        return {"x_eager_both": 3.0, "memory_less": 20.0}
    return {}
