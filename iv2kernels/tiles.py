"""Which tiles Triton's kernels use where ``tune`` found better ones than the default on this GPU.

The default needs no tuning. What tune may try stands beside it (``alternatives`` in
triton/attention_tiles.py and triton/gemm.py): a few tiles for each kernel and width, all of which
`make gates` compiles, so that none spills. Nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch


class Knob(NamedTuple):
    """What a tile is chosen for: a kernel at one width of its tensors."""

    kernel: str
    width: int
    dtype: torch.dtype


Sizes = tuple[int, ...]
Seen = dict[Knob, list[Sizes]]
T = TypeVar("T", bound=Sizes)

# What iv2kernels/tuning.py found or read.
CHOSEN: dict[Knob, Sizes] = {}
_recorders: list[Seen] = []


def choose(knob: Knob, default: T, alternatives: Sequence[T]) -> T:
    """The tile found for a kernel, or its default."""
    for seen in _recorders:
        seen[knob] = [tuple(tile) for tile in (default, *alternatives)]
    found = CHOSEN.get(knob, default)
    # what another version stored may be of another kind
    kind: Any = type(default)
    return kind(*found) if len(found) == len(default) else default


@contextmanager
def recording() -> Iterator[Seen]:
    """What could be chosen within, the default first."""
    seen: Seen = {}
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders.remove(seen)
