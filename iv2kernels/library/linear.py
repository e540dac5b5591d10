"""linear on the GEMM that torch has for each product, and halves through float32 where it has none.

torch sends float32 to MKL and bfloat16 to oneDNN, and so do we: bfloat16 through torch's private
``mkldnn._linear_pointwise``, which has less around it (1-15 % with a bias); where that op is absent
(another torch, another machine) torch's own choice stays. oneDNN takes float32 too, 5-10 % faster
than MKL on a Zen 4, 60 % with a vocabulary of columns, but its long chains of additions round two
to three times more (relative 1.0e-6 against 4e-7), which linear must not and a loss may.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
)


def _supported(name: str) -> bool:
    query = getattr(torch.ops.mkldnn, name, None)
    return _HAS_ONEDNN and query is not None and bool(query())


# By dtype: whether `_linear_pointwise` runs here.
_ONEDNN = {
    torch.float32: _HAS_ONEDNN,
    torch.bfloat16: _supported("_is_mkldnn_bf16_supported"),
    torch.float16: _supported("_is_mkldnn_fp16_supported"),
}
# Without a GEMM of theirs in hardware torch multiplies one element at a time, at 1-20 GFLOP/s where
# float32 reaches 170: such inputs are converted first.
WIDEN = {dtype for dtype in (torch.bfloat16, torch.float16) if not _ONEDNN[dtype]}
# Calling it costs 15 us more than F.linear.
_LEAST_FLOPS = 1 << 21


def matmul_t(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, long_chains: bool = False
) -> Tensor:
    """``x @ weight.T + bias`` for x [..., K] and weight [N, K].

    long_chains: float32 may go to oneDNN.
    """
    if x.dtype in WIDEN:
        wide_bias = None if bias is None else bias.float()
        return matmul_t(x.float(), weight.float(), wide_bias).to(x.dtype)
    onednn = _ONEDNN.get(x.dtype, False) and (long_chains or x.dtype != torch.float32)
    if not onednn or 2 * x.numel() * weight.shape[0] < _LEAST_FLOPS:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices of one dtype, on torch's own choice."""
    if a.dtype in WIDEN:
        return torch.mm(a.float(), b.float()).to(a.dtype)
    return torch.mm(a, b)


def as_rows(x: Tensor) -> Tensor:
    """X [..., K] as [M, K], also when it is empty."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See iv2kernels/ops/linear.py."""
    return matmul_t(x, weight, bias)


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dy W, dyᵀ x and Σ dy; the ones not needed are empty."""
    dy2, x2 = as_rows(dy), as_rows(x)
    dx = matmul(dy2, weight).view(x.shape) if needs[0] else x.new_empty(0)
    dweight = matmul(dy2.t(), x2) if needs[1] else x.new_empty(0)
    dbias = dy2.sum(0) if needs[2] else x.new_empty(0)
    return dx, dweight, dbias
