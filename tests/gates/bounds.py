"""The least time that a kernel can take on a GPU, by the rates of its datasheet: no measurement.

A kernel does its multiplications and additions at the highest rate, and reads and writes each
element that it must once, in memory and not in a cache, both at the same time. No kernel does; how
far one is from it only a GPU can tell.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Datasheet(NamedTuple):
    """What a vendor says of its GPU, without sparsity; tera are 10^12."""

    name: str
    bfloat16: float  # TFLOP/s of the tensor cores, summed in float32
    float32: float  # TFLOP/s of the other cores: float32 is multiplied in full precision
    memory: float  # TB/s


DATASHEETS = {
    "sm_80": Datasheet("NVIDIA A100 80GB SXM datasheet", 312, 19.5, 2.039),
    "sm_90": Datasheet("NVIDIA H100 SXM datasheet", 989.4, 66.9, 3.35),
    "sm_100": Datasheet("NVIDIA HGX B200 datasheet", 2250, 80, 8.0),
    "sm_120": Datasheet("NVIDIA RTX Blackwell whitepaper, RTX 5090", 209.5, 104.8, 1.792),
    "gfx942": Datasheet("AMD Instinct MI300X data sheet", 1307.4, 163.4, 5.3),
}


class Bound(NamedTuple):
    """Of one pass of an op."""

    op: str
    shape: str
    dtype: str
    part: str
    microseconds: float
    by: str  # memory, tensor cores or cores


def bound(flops: int, size: int, dtype: str, arch: str) -> tuple[float, str]:
    """Microseconds, and what they go to."""
    sheet = DATASHEETS[arch]
    rate, cores = (
        (sheet.float32, "cores") if dtype == "float32" else (sheet.bfloat16, "tensor cores")
    )
    return max((flops / rate / 1e6, cores), (size / sheet.memory / 1e6, "memory"))


def bounds(arch: str, ops: Sequence[str], dtypes: Sequence[str]) -> Iterator[Bound]:
    """Of the shapes of the GPU bench, forward and backward."""
    for op in ops:
        page = importlib.import_module(f"bench.ops.{op}")
        parts = {"forward": page.work, "backward": getattr(page, "backward_work", None)}
        for dtype in getattr(page, "DTYPES", dtypes):
            for shape in getattr(page, "GPU_SHAPES", page.SHAPES):
                name = "x".join(map(str, shape))
                for part, work in parts.items():
                    if work is not None:
                        flops, size = work(shape, getattr(torch, dtype))
                        yield Bound(op, name, dtype, part, *bound(flops, size, dtype, arch))
