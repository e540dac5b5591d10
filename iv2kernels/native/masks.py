"""masks on csrc/cpu/masks.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import contiguous, ptr
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
    ids = torch.empty(batch, max(rows, repeat) * num_keep, dtype=torch.int32)
    seeds, weights = seeds.contiguous(), contiguous(weights)
    if batch * rows * num_tokens == 0:
        return ids
    keys = torch.empty(batch * rows, num_tokens, dtype=torch.int32)
    bad = torch.zeros(1, dtype=torch.int64)
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
        torch.get_num_threads() if keys.numel() >= _MIN_PARALLEL else 1,
    )
    if weights is not None and bad.item():
        check_weights(weights)
    return ids
