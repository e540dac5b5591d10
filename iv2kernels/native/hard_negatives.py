"""hard_negatives on csrc/cpu/hard_negatives.cpp."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import ptr
from iv2kernels.ops.hard_negatives import STREAM, check_values

# What is best in a column is found per chunk of rows, in this many at most.
_MAX_CHUNKS = 64


def _by_columns(t: Tensor) -> Tensor:  # [B, D] -> [column blocks, D, _C.hard_negatives_columns]
    size = _C.hard_negatives_columns
    padded = F.pad(t.float(), (0, 0, 0, -t.shape[0] % size))
    return padded.view(-1, size, t.shape[1]).transpose(1, 2).contiguous()


def hard_negatives_draw(
    v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None, seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: HardNegativesDraw."""
    check_values(v, t, temperature)
    batch = v.shape[0]
    neg_t = torch.empty(batch, dtype=torch.int32)
    neg_v = torch.empty_like(neg_t)
    if batch == 0:
        return neg_t, neg_v
    if v.shape[1] == 0:  # all similarities are 0
        v = t = v.new_zeros(batch, 1)
    classes = torch.arange(batch) if ids is None else ids.unique(return_inverse=True)[1]
    classes, seeds = classes.int().contiguous(), seeds.contiguous()
    v, columns = v.float().contiguous(), _by_columns(t)
    chunks = min(_MAX_CHUNKS, -(-batch // _C.hard_negatives_rows))
    best = torch.empty(chunks, batch)
    best_row = torch.empty(chunks, batch, dtype=torch.int32)
    _C.hard_negatives_draw(
        ptr(v),
        ptr(columns),
        ptr(classes),
        ptr(seeds),
        ptr(neg_t),
        ptr(neg_v),
        ptr(best),
        ptr(best_row),
        batch,
        v.shape[1],
        chunks,
        STREAM,
        math.log2(math.e) / temperature.item(),
        torch.get_num_threads(),
    )
    return neg_t, neg_v
