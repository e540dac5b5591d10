"""Inputs and work of linear_cross_entropy: what is timed is what is tested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# (N, C, V): the text encoder's masked tokens (all rows count), and a small language model
SHAPES = [(512, 1024, 30522), (1024, 576, 49152)]
GPU_SHAPES = [(8192, 1024, 30522)]
WRT = ("x", "weight")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of the op, by name."""
    rows, width, vocabulary = shape
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=g) / width**0.5
    target = torch.randint(vocabulary, (rows,), generator=g)
    # rows that lean towards their class, as in training
    x = 2 * weight[target] + torch.randn(rows, width, generator=g)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "target": target}


def work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Flops and bytes of the forward pass without gradients."""
    rows, width, vocabulary = shape
    return 2 * rows * width * vocabulary, (rows + vocabulary) * width * dtype.itemsize


def backward_work(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[int, int]:
    """A product for each gradient, of logits that are known."""
    rows, width, vocabulary = shape
    return 4 * rows * width * vocabulary, 2 * (rows + vocabulary) * width * dtype.itemsize


def library(shape: tuple[int, int, int]) -> Callable[..., Tensor]:
    """PyTorch's own; the cases here have no ignored rows."""

    def call(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target)

    return call


def goals(shape: tuple, dtype: str) -> dict[str, float]:
    """The least values of columns of the table."""
    return {"x_library_both": 1.5 if dtype == "float32" else 1.0}
