"""How tensors reach the native kernels: addresses, dtype codes, and where a kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

# DType of csrc/kernels.h
DTYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def ptr(x: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def contiguous(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """X in row-major order, and in dtype when one is given."""
    if x is None:
        return None
    return (x if dtype is None else x.to(dtype)).contiguous()


def floats(x: Tensor | None) -> Tensor | None:
    """X as contiguous float32: how kernels take weights."""
    return contiguous(x, torch.float32)


def on_cuda(x: Tensor) -> bool:
    """Whether x's kernels are csrc/cuda's: nothing then may look at a value, which would wait."""
    return x.is_cuda


def place(x: Tensor) -> tuple[int, ...]:
    """The last arguments of a kernel on x: the CPU's threads, or none and the GPU's stream."""
    if not on_cuda(x):
        return (torch.get_num_threads(),)
    return 0, torch.cuda.current_stream(x.device).cuda_stream
