"""masks on csrc/cpu/masks.cpp and csrc/cuda/masks.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import contiguous, on_cuda, place, ptr
from iv2kernels.ops.masks import check_weights

# Below this many tokens in all, waking another thread costs more than it saves.
_MIN_PARALLEL = 8192


def masks_draw(
    seeds: Tensor,
    weights: Tensor | None,
    num_tokens: int,
    num_keep: int,
    repeat: int,
    stream: int,
) -> Tensor:
    """See csrc/kernels.h: MasksDraw."""
    batch, rows = seeds.shape[0], 1 if weights is None else weights.shape[1]
    device = seeds.device
    ids = torch.empty(batch, max(rows, repeat) * num_keep, dtype=torch.int32, device=device)
    seeds, weights = seeds.contiguous(), contiguous(weights)
    if batch * rows * num_tokens == 0:
        return ids
    keys = torch.empty(batch * rows, num_tokens, dtype=torch.int32, device=device)
    bad = None if on_cuda(seeds) else torch.zeros(1, dtype=torch.int64)
    is_small = bad is not None and keys.numel() < _MIN_PARALLEL
    _C.masks_draw(
        ptr(seeds),
        ptr(weights),
        ptr(ids),
        ptr(keys),
        ptr(bad),
        batch,
        rows,
        num_tokens,
        num_keep,
        repeat,
        stream,
        *((1,) if is_small else place(seeds)),
    )
    if weights is not None and bad is not None and bad.item():
        check_weights(weights)
    return ids
