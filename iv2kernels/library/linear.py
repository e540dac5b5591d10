"""linear on oneDNN, through torch's private `mkldnn._linear_pointwise`.

torch sends float32 to MKL, which is slow on AMD machines, and bfloat16 to oneDNN. Where the
private op is absent (another torch, another machine), this is `F.linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()


def matmul_t(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for x [..., K] and weight [N, K]."""
    if not _HAS_ONEDNN or x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See iv2kernels/ops/linear.py."""
    return matmul_t(x, weight, bias)


def linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy W, dW = dyᵀ x, db = Σ dy; the ones not needed are empty."""
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = matmul_t(dy2, weight.t()).view(x.shape) if needs[0] else x.new_empty(0)
    # both operands transposed: MKL is as fast here
    dweight = dy2.t() @ x2 if needs[1] else x.new_empty(0)
    # bfloat16 sums go through float32 inside torch
    dbias = dy2.sum(0) if needs[2] else x.new_empty(0)
    return dx, dweight, dbias
