"""Inputs and work of hard_negatives: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# (B, D): stage 2's contrastive width, a local batch and a gathered one
SHAPES = [(128, 512), (4096, 512)]
GPU_SHAPES = [(4096, 512)]
WRT = ()


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor | float]:
    """The arguments of the op, by name."""
    batch, width = shape
    g = torch.Generator().manual_seed(0)
    v = torch.randn(batch, width, generator=g)
    t = v + torch.randn(batch, width, generator=g)
    v, t = (torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in (v, t))
    return {
        "v": v,
        "t": t,
        "temperature": 0.07,
        "ids": torch.randint(2 * batch, (batch,), generator=g),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
    }


def work(shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Operations (a score, and 60 for the noise of both directions) and bytes."""
    batch, width = shape
    return batch**2 * (2 * width + 60), 2 * batch * width * dtype.itemsize
