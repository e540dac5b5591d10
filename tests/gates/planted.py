"""Kernels with what the gates look for, run by test_gates.py in a process of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tests.gates.budgets import complaints
from tests.gates.compiling import compiling
from tests.gates.resources import usage


@triton.jit
def _spilling_kernel(x, y, BLOCK: tl.constexpr):
    # 512 values alive in each lane of one warp
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    total = tl.sum(a * b)
    tl.store(x + i, a - total)
    tl.store(y + i, b * total)


@triton.jit
def _adding_kernel(x, y, BLOCK: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


if __name__ == "__main__":
    x, y = torch.zeros(8192), torch.zeros(8192)
    with compiling("sm_90") as launches:
        _spilling_kernel[(1,)](x, y, BLOCK=8192, num_warps=1, enable_fp_fusion=True)
        _adding_kernel[(1,)](x, y, BLOCK=1024, enable_fp_fusion=True)
    for launch in launches:
        print(complaints(launch.name, usage("sm_90", launch.compiled), None))
