"""Interleaved timing: candidates take turns in one process; a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[Callable[[], object]], float]

# More than the L2 cache of any GPU so far.
_FLUSHED_BYTES = 256 << 20


def wall(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaClock:
    """Seconds between two events of the current stream around a call.

    Args:
        flush: Write over the L2 cache before each call, so that no candidate finds its inputs
            there. A short kernel then seldom waits for its launch either: Python goes on while the
            GPU writes.
    """

    def __init__(self, flush: bool = False) -> None:
        self._flushed = (
            torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda") if flush else None
        )
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds that a call takes on the GPU."""
        if self._flushed is not None:
            self._flushed.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float = 1.0,
    min_rounds: int = 5,
    clock: Clock = wall,
) -> dict[str, list[float]]:
    """Seconds of each call, by candidate: A B A B …, after a warm-up round.

    Args:
        candidates: What to call, by name.
        seconds: How long to go on, over all candidates.
        min_rounds: Rounds at least.
        clock: Times a call: ``wall`` on a CPU, a ``CudaClock`` on a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    began = time.perf_counter()
    while len(next(iter(times.values()))) < min_rounds or time.perf_counter() - began < seconds:
        for name, call in candidates.items():
            times[name].append(clock(call))
    return times


def median_ratio(baseline: list[float], times: list[float]) -> float:
    """How many times faster than the baseline, round by round."""
    return statistics.median(b / t for b, t in zip(baseline, times, strict=True))
