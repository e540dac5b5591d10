"""Interleaved timing: candidates take turns in one process; a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 1.0, min_rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call, by candidate: A B A B …, after a warm-up round.

    Args:
        candidates: What to call, by name.
        seconds: How long to go on, over all candidates.
        min_rounds: Rounds at least.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    began = time.perf_counter()
    while len(next(iter(times.values()))) < min_rounds or time.perf_counter() - began < seconds:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(baseline: list[float], times: list[float]) -> float:
    """How many times faster than the baseline, round by round."""
    return statistics.median(b / t for b, t in zip(baseline, times, strict=True))
