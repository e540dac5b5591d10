"""What is measured of a case: time, memory, error, and what the machine can do at all."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Call
from iv2kernels.library.linear import WIDEN
from iv2kernels.timing import Clock, CudaClock, interleaved, wall


def clock_for(device: str) -> Clock:
    """Wall time on a CPU; on a GPU events, with nothing of the last call in its caches."""
    return wall if device == "cpu" else CudaClock(flush=True)


def peaks(device: str = "cpu", seconds: float = 0.1) -> dict[str, float]:
    """What this machine reaches now: GEMM GFLOP/s by dtype, and GB/s of a copy.

    Taken before and after each case, since machines are shared and clocks move; ``best`` of the two
    is what the case is held against.

    On a GPU float32 is multiplied without tensor cores, as our kernels do. On a CPU a float32 GEMM
    is timed through torch's matmul and through oneDNN, since MKL is soft on some
    CPUs: the better one is the peak. Where the CPU has no bfloat16 GEMM its peak is that of
    float32, to which such matrices can be converted.
    """
    found = {}
    on_cpu, clock = device == "cpu", clock_for(device)
    size = 1536 if on_cpu else 8192
    for dtype in (torch.float32, torch.bfloat16):
        if on_cpu and dtype in WIDEN:
            found["bfloat16"] = found["float32"]
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        gemms: dict[str, Callable[[], Any]] = {"matmul": lambda a=a, b=b: a @ b}
        if on_cpu and torch.backends.mkldnn.is_available():
            fused = torch.ops.mkldnn._linear_pointwise
            gemms["oneDNN"] = partial(fused, a, b, None, "none", [], "")
        times = interleaved(gemms, seconds, clock=clock)
        least = min(min(row) for row in times.values())
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / least / 1e9
    x = torch.randn(16 << 20 if on_cpu else 256 << 20, device=device)
    y = torch.empty_like(x)
    least = min(interleaved({"copy": lambda: y.copy_(x)}, seconds, clock=clock)["copy"])
    found["copy"] = 2 * x.nbytes / least / 1e9
    return found


def best(*measured: dict[str, float]) -> dict[str, float]:
    """The highest of each rate."""
    return {name: max(m[name] for m in measured) for name in measured[0]}


def floor_seconds(work: tuple[int, int], dtype: str, machine: dict[str, float]) -> float:
    """The least time for so many flops and bytes: the roofline of ``peaks``."""
    flops, size = work
    return max(flops / machine.get(dtype, machine["float32"]), size / machine["copy"]) / 1e9


def spread(times: list[float]) -> float:
    """The interquartile range over the median, in percent."""
    if len(times) < 4:
        return 0.0
    low, median, high = statistics.quantiles(times, n=4)
    return 100 * (high - low) / median


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> float:
    """MB that a call holds at most beyond what it was given, by torch's allocations."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    del kept
    result = recorded.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        most = max(most, held)
    return most / 1e6


def times_of(
    calls: dict[str, Call], seconds: float, clock: Clock = wall
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of each candidate, in turn: forward, and forward with backward."""
    forwards = {name: call.forward for name, call in calls.items()}
    forward = interleaved(forwards, seconds / 2, clock=clock)
    if not any(call.has_backward for call in calls.values()):
        return forward, forward
    both = {name: call.both for name, call in calls.items()}
    return forward, interleaved(both, seconds, clock=clock)
