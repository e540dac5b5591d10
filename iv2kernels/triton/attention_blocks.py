"""attention with lists of blocks on the kernels of attention.py: each tile is a piece of a block.

The lists of ``BlockMask`` lie on the CPU. They are cut into tiles there and copied to the GPU once,
when they are first used: a step of training waits for nothing. Small blocks get small tiles, so
that a block of 16 tokens is no tile of 128.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from iv2kernels.triton import attention
from iv2kernels.triton.attention import Lists, Options
from iv2kernels.triton.attention_tiles import Tile, Tiles, tiles_for

# What became of BlockMask's tensors of blocks, by tile and device.
_CUT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Row = tuple[int, int, int, int]  # first token, tokens, runs from and to


def _cut(blocks: list[Row], runs: list[tuple[int, int]], tile: Tile, device: torch.device) -> Lists:
    largest = triton.next_power_of_2(max(row[1] for row in blocks))
    rows = min(max(largest, 16), tile.rows)
    # few rows are multiplied from registers: four warps share what would not fit those of one
    tile = tile._replace(rows=rows, warps=max(tile.warps * rows // tile.rows, 4))
    pieces = [
        (at, min(rows, first + count - at), begin, end)
        for first, count, begin, end in blocks
        for at in range(first, first + count, rows)
    ]
    table = torch.tensor(pieces, dtype=torch.int32, device=device)
    return Lists(table, torch.tensor(runs, dtype=torch.int32, device=device), tile)


def _by_query(
    k_blocks: list[Row], runs: list[tuple[int, int]]
) -> tuple[list[Row], list[tuple[int, int]]]:
    """The blocks of queries and the keys that they see, from those of keys that are seen."""
    seen_by = [(row[0], row[0] + row[1], runs[row[2] : row[3]]) for row in k_blocks]
    edges = sorted({edge for _, _, queries in seen_by for run in queries for edge in run})
    blocks: list[Row] = []
    found: list[tuple[int, int]] = []
    before: list[tuple[int, int]] = []
    for first, end in pairwise(edges):
        keys: list[tuple[int, int]] = []
        for a, b, queries in seen_by:
            if any(begin <= first < stop for begin, stop in queries):
                keys = (
                    [*keys[:-1], (keys[-1][0], b)] if keys and keys[-1][1] == a else [*keys, (a, b)]
                )
        if keys == before:  # one block with the one in front
            blocks[-1] = (blocks[-1][0], end - blocks[-1][0], *blocks[-1][2:])
            continue
        blocks.append((first, end - first, len(found), len(found) + len(keys)))
        found += keys
        before = keys
    return blocks, found


def lists_of(q_blocks: Tensor, runs: Tensor, tiles: Tiles, device: torch.device) -> Lists:
    """What the forward kernel takes of BlockMask's tensors."""
    known = _CUT.setdefault(q_blocks, {})
    key = tiles, device
    if key not in known:
        known[key] = _cut(q_blocks.tolist(), runs.tolist(), tiles.forward, device)
    return known[key]


def lists_of_backward(
    k_blocks: Tensor, runs: Tensor, tiles: Tiles, device: torch.device
) -> tuple[Lists, Lists]:
    """What the two backward kernels take: the lists of queries and those of keys."""
    known = _CUT.setdefault(k_blocks, {})
    key = tiles, device
    if key not in known:
        keys, seen = k_blocks.tolist(), runs.tolist()
        queries = _cut(*_by_query(keys, seen), tiles.dq, device)
        known[key] = queries, _cut(keys, seen, tiles.dkdv, device)
    return known[key]


def attention_blocks_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_blocks: Tensor, runs: Tensor, pairs: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/attention_blocks.py."""
    lists = lists_of(q_blocks, runs, tiles_for(q.shape[-1], q.dtype), q.device)
    options = Options(None, None, q.shape[1], k.shape[1], False, scale)
    return attention.forward(q, k, v, options, lists)


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
    """The gradients of q, k and v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lists = lists_of_backward(k_blocks, runs, tiles_for(q.shape[-1], q.dtype), q.device)
    options = Options(None, None, q.shape[1], k.shape[1], False, scale)
    attention.backward((d_o, dlse), (q, k, v, o, lse), (dq, dk, dv), options, lists)
    return dq, dk, dv
