"""Which keys a query sees, by blocks of tokens: the lists that attention takes as ``blocks``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from iv2kernels import dispatch
from iv2kernels.dispatch import Function


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of key blocks by query block, the same for every sample and head.

    Every query of block i sees every key of the blocks indices[offsets[i] : offsets[i + 1]].
    Blocks may have any sizes, so that a CLS token is a block of one and no pattern is rounded.
    Build it once, outside compiled code: building checks the values and lists the queries of
    each key for backward.

    Attributes:
        q_starts: [Q + 1] int32, the first query of each block, from 0 to the number of queries.
        k_starts: [K + 1] int32, the same for keys.
        offsets: [Q + 1] int32, from 0 to the length of indices; each block sees at least one.
        indices: [nnz] int32, key blocks, rising within a query block.
        num_queries: Of tokens; so num_keys.
        pairs: How many pairs of a query and a key are seen.

    Raises:
        ValueError: The lists are not as described.
        TypeError: A list is not int32.
    """

    q_starts: Tensor  # [Q + 1] int32
    k_starts: Tensor  # [K + 1] int32
    offsets: Tensor  # [Q + 1] int32
    indices: Tensor  # [nnz] int32
    num_queries: int = field(init=False)
    num_keys: int = field(init=False)
    pairs: int = field(init=False)
    # For kernels: per block its first token, count, and rows of runs; runs are [first, end) tokens.
    q_blocks: Tensor = field(init=False, repr=False)  # [Q, 4] int32
    k_blocks: Tensor = field(init=False, repr=False)  # [K, 4] int32
    runs: Tensor = field(init=False, repr=False)  # [R, 2] int32

    def __post_init__(self) -> None:
        _check_lists(self)
        q, k, offsets = self.q_starts.tolist(), self.k_starts.tolist(), self.offsets.tolist()
        indices = self.indices.tolist()
        seen = [indices[a:b] for a, b in pairwise(offsets)]
        seen_by: list[list[int]] = [[] for _ in k[:-1]]
        for i, keys in enumerate(seen):
            for j in keys:
                seen_by[j].append(i)
        runs: list[tuple[int, int]] = []
        q_blocks, k_blocks = _blocks(q, seen, k, runs), _blocks(k, seen_by, q, runs)
        lengths = [sum(b - a for a, b in runs[row[2] : row[3]]) for row in q_blocks]
        for name, value in (
            ("num_queries", q[-1]),
            ("num_keys", k[-1]),
            ("pairs", sum(row[1] * n for row, n in zip(q_blocks, lengths, strict=True))),
            ("q_blocks", torch.tensor(q_blocks, dtype=torch.int32)),
            ("k_blocks", torch.tensor(k_blocks, dtype=torch.int32)),
            ("runs", torch.tensor(runs, dtype=torch.int32)),
        ):
            object.__setattr__(self, name, value)

    @property
    def density(self) -> float:
        """The share of pairs of a query and a key that are seen."""
        return self.pairs / (self.num_queries * self.num_keys)

    def dense(self) -> Tensor:
        """The same as booleans [Nq, Nk], True where a key is seen."""
        sizes = [x.diff().long() for x in (self.q_starts, self.k_starts, self.offsets)]
        table = torch.zeros(len(sizes[0]), len(sizes[1]), dtype=torch.bool)
        table[torch.arange(len(sizes[0])).repeat_interleave(sizes[2]), self.indices.long()] = True
        return table.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)


def _blocks(
    starts: list[int], seen: list[list[int]], other: list[int], runs: list[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    """A row per block; what it sees is appended to runs, neighbouring blocks as one run."""
    rows = []
    for i, blocks in enumerate(seen):
        first = len(runs)
        for j in blocks:
            if len(runs) > first and runs[-1][1] == other[j]:
                runs[-1] = (runs[-1][0], other[j + 1])
            else:
                runs.append((other[j], other[j + 1]))
        rows.append((starts[i], starts[i + 1] - starts[i], first, len(runs)))
    return rows


def _check_lists(mask: BlockMask) -> None:
    lists = {name: getattr(mask, name) for name in ("q_starts", "k_starts", "offsets", "indices")}
    for name, x in lists.items():
        if x.dtype != torch.int32:
            raise TypeError(f"BlockMask: {name} must be int32, got {x.dtype}")
        if x.dim() != 1 or x.numel() < (1 if name == "indices" else 2):
            raise ValueError(f"BlockMask: {name} must be a list of blocks, got {list(x.shape)}")
        if name != "indices" and (x[0] != 0 or (x.diff() <= 0).any()):
            raise ValueError(f"BlockMask: {name} must rise from 0, got {x.tolist()}")
    q_starts, k_starts, offsets, indices = lists.values()
    if offsets.numel() != q_starts.numel() or offsets[-1] != indices.numel():
        raise ValueError(
            f"BlockMask: offsets must be [{q_starts.numel()}] and end at the {indices.numel()} "
            f"indices, got {offsets.tolist()}"
        )
    blocks = k_starts.numel() - 1
    if indices.min() < 0 or indices.max() >= blocks:
        raise ValueError(f"BlockMask: indices must be in [0, {blocks}), got {indices.tolist()}")
    rises = indices.diff() > 0
    rises[offsets[1:-1].long() - 1] = True
    if not rises.all():
        raise ValueError(
            f"BlockMask: indices must rise within a query block, got {indices.tolist()}"
        )


def _build(sizes: list[int], sees: Callable[[int, int], bool], cls_token: bool) -> BlockMask:
    """Self-attention among blocks; the CLS, a block of one in front, sees and is seen by all."""
    seen = [[j for j in range(len(sizes)) if sees(i, j)] for i in range(len(sizes))]
    if cls_token:
        sizes = [1, *sizes]
        seen = [list(range(len(sizes))), *([0, *(j + 1 for j in keys)] for keys in seen)]
    starts = torch.tensor([0, *sizes]).cumsum(0).int()
    offsets = torch.tensor([0, *map(len, seen)]).cumsum(0).int()
    indices = torch.tensor([j for keys in seen for j in keys], dtype=torch.int32)
    return BlockMask(starts, starts, offsets, indices)


def _check_grid(name: str, grid: tuple[int, int, int]) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"{name}: grid must be (T, H, W), each at least 1, got {grid}")


def per_frame(grid: tuple[int, int, int], *, cls_token: bool = False) -> BlockMask:
    """Lists with which a token sees its own frame (space attention); exact.

    Args:
        grid: Tokens of the clip as (T, H, W), in this order, time first.
        cls_token: A CLS token comes first; it sees all tokens and all see it.

    Returns:
        The mask over [cls_token +] T * H * W tokens.

    Raises:
        ValueError: grid is not three positive numbers.
    """
    _check_grid("per_frame", grid)
    return _build([grid[1] * grid[2]] * grid[0], lambda i, j: i == j, cls_token)


def per_tube(grid: tuple[int, int, int], *, cls_token: bool = False) -> BlockMask:
    """Lists with which a token sees its place in all frames (time attention), in tube order.

    In time order a tube is strided, and no list of blocks is cheap. So this is for tokens in tube
    order, where it is exact: ``x.unflatten(1, (T, H * W)).transpose(1, 2).flatten(1, 2)`` of the
    tokens behind the CLS.

    Args:
        grid: Tokens of the clip as (T, H, W).
        cls_token: A CLS token comes first; it sees all tokens and all see it.

    Returns:
        The mask over [cls_token +] H * W * T tokens in tube order.

    Raises:
        ValueError: grid is not three positive numbers.
    """
    _check_grid("per_tube", grid)
    return _build([grid[0]] * (grid[1] * grid[2]), lambda i, j: i == j, cls_token)


def spacetime_window(
    grid: tuple[int, int, int], frames: int, rows: int | None = None, *, cls_token: bool = False
) -> BlockMask:
    """Lists with which a token sees a sliding window of frames and rows around its own; exact.

    A block is a row of the grid (a frame when rows is None), so a window spans the full width.

    Args:
        grid: Tokens of the clip as (T, H, W), in this order, time first.
        frames: A token sees frames at most so many before or after its own.
        rows: And rows at most so many above or below its own; None: whole frames.
        cls_token: A CLS token comes first; it sees all tokens and all see it.

    Returns:
        The mask over [cls_token +] T * H * W tokens.

    Raises:
        ValueError: grid is not three positive numbers, or frames or rows is negative.
    """
    _check_grid("spacetime_window", grid)
    if frames < 0 or (rows is not None and rows < 0):
        raise ValueError(
            f"spacetime_window: frames and rows must not be negative, got {frames} and {rows}"
        )
    per, size = (1, grid[1] * grid[2]) if rows is None else (grid[1], grid[2])
    reach = 0 if rows is None else rows

    def sees(i: int, j: int) -> bool:
        return abs(i // per - j // per) <= frames and abs(i % per - j % per) <= reach

    return _build([size] * (grid[0] * per), sees, cls_token)


def all_blocks(tokens: int, block_size: int, *, cls_token: bool = False) -> BlockMask:
    """Lists with which every token sees every other: attention without lists, for comparison.

    Args:
        tokens: Without the CLS token.
        block_size: Tokens of a block; the last one may be smaller.
        cls_token: A CLS token comes first, as a block of its own.

    Returns:
        The mask over [cls_token +] tokens.

    Raises:
        ValueError: tokens or block_size is below 1.
    """
    if tokens < 1 or block_size < 1:
        raise ValueError(
            f"all_blocks: tokens and block_size must be at least 1, got {tokens} and {block_size}"
        )
    sizes = [min(block_size, tokens - first) for first in range(0, tokens, block_size)]
    return _build(sizes, lambda i, j: True, cls_token)


def attention_blocks(
    q: Tensor,  # [B, Nq, heads, head_dim]
    k: Tensor,  # [B, Nk, kv_heads, head_dim]
    v: Tensor,  # [B, Nk, kv_heads, head_dim]
    blocks: BlockMask,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Attention with lists on checked inputs: o and lse."""
    lists = blocks.q_blocks, blocks.k_blocks, blocks.runs
    return _AttentionBlocks.apply(q, k, v, *lists, blocks.pairs, scale, impl)  # type: ignore[no-any-return]


class _AttentionBlocks(Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_blocks: Tensor,
        k_blocks: Tensor,
        runs: Tensor,
        pairs: int,
        scale: float,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        return _fwd(q, k, v, q_blocks, runs, pairs, scale, impl)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, _, k_blocks, runs, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, k_blocks, runs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_o: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, k_blocks, runs = ctx.saved_tensors
        if d_o is None and dlse is None:
            return (None,) * 9
        d_o = torch.zeros_like(o) if d_o is None else d_o
        grads = _bwd(d_o, dlse, q, k, v, o, lse, k_blocks, runs, *ctx.options)
        return (*grads, *(None,) * 6)


def _fwd_fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def bwd_fake(
    d_o: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Of attention_bwd and attention_blocks_bwd: gradients like q, k and v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


_fwd = dispatch.define(
    "attention_blocks_fwd(Tensor q, Tensor k, Tensor v, Tensor q_blocks, Tensor runs, "
    "SymInt pairs, float scale, str impl) -> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = dispatch.define(
    "attention_blocks_bwd(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
    "Tensor lse, Tensor k_blocks, Tensor runs, SymInt pairs, float scale, str impl) "
    "-> (Tensor, Tensor, Tensor)",
    bwd_fake,
)
