"""Interleaved timing: candidates take turns in one process; a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


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


def peaks(seconds: float = 0.3) -> dict[str, float]:
    """What this machine reaches now: GEMM GFLOP/s by dtype, and GB/s of a copy."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        best = min(interleaved({"gemm": lambda a=a, b=b: a @ b}, seconds)["gemm"])
        found[str(dtype).removeprefix("torch.")] = 2 * 1536**3 / best / 1e9
    x = torch.randn(16 << 20)
    y = torch.empty_like(x)
    best = min(interleaved({"copy": lambda: y.copy_(x)}, seconds)["copy"])
    found["copy"] = 2 * x.nbytes / best / 1e9
    return found
