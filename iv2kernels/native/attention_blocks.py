"""attention with lists of blocks on csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native import attention
from iv2kernels.native.attention import Lists, Options


def _tiles(blocks: Tensor, size: int) -> Tensor:
    """Blocks of at most `size` tokens each: the rows of csrc/kernels.h: AttentionFwd.tiles."""
    first, count, begin, end = blocks.unbind(1)
    pieces = (count + size - 1) // size
    block = torch.repeat_interleave(pieces)
    done = (torch.arange(block.numel()) - (pieces.cumsum(0) - pieces)[block]) * size
    rows = (first[block] + done, (count[block] - done).clamp(max=size), begin[block], end[block])
    return torch.stack(rows, 1).int()


def lists_of(blocks: Tensor, runs: Tensor, pairs: int, size: int) -> Lists:
    """What the kernel takes of BlockMask's tensors."""
    return Lists(_tiles(blocks, size), runs.contiguous(), pairs)


def _options(
    q: Tensor, k: Tensor, blocks: Tensor, size: int, rest: tuple[Tensor, int, float]
) -> Options:
    runs, pairs, scale = rest
    lists = lists_of(blocks, runs, pairs, size)
    return Options(None, None, q.shape[1], k.shape[1], False, scale, lists)


def attention_blocks_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, runs: Tensor, pairs: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: AttentionFwd."""
    options = _options(q, k, q_blocks, _C.attention_queries, (runs, pairs, scale))
    return attention.forward(q, k, v, options)


def attention_blocks_bwd(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    k_blocks: Tensor,
    runs: Tensor,
    pairs: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AttentionBwd."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    options = _options(q, k, k_blocks, _C.attention_block, (runs, pairs, scale))
    attention.backward((d_o, dlse), (q, k, v, o, lse), (dq, dk, dv), options)
    return dq, dk, dv
