"""Inputs and work of masks: what is timed is what is tested."""

from __future__ import annotations

import torch
from torch import Tensor

# The op that is timed; random_mask and tube_mask are the same kernel without weights.
OP = "attention_guided_mask"
# (B, F, N, num_keep): stage 1 (per frame), distillation (whole clip)
SHAPES = [(32, 8, 256, 52), (32, 1, 2048, 410)]
WRT = ()
DTYPES = ("float32",)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor | int]:
    """The arguments of the op, by name."""
    batch, rows, tokens, keep = shape
    g = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
    weights = torch.randn(batch, rows, tokens, generator=g).softmax(-1)
    return {"seeds": seeds, "weights": weights.to(dtype), "num_keep": keep}


def work(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Operations (about 30 an element, most of them integer) and bytes."""
    batch, rows, tokens, keep = shape
    return 30 * batch * rows * tokens, 4 * batch * rows * (tokens + keep)
