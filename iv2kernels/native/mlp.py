"""mlp: GEMMs of the library, GELU and its gradients on csrc/cpu/mlp.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.library.linear import as_rows, matmul, matmul_t
from iv2kernels.native.memory import DTYPE, ptr


def mlp_fwd(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    approximate: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: MlpFwd. The second result is z, empty unless it is to be saved."""
    z = matmul_t(as_rows(x), fc1_weight, fc1_bias)
    a = torch.empty_like(z) if save else z
    if z.numel() > 0:
        _C.mlp_fwd(
            ptr(z),
            ptr(a),
            *z.shape,
            DTYPE[z.dtype],
            approximate == "tanh",
            torch.get_num_threads(),
        )
    y = matmul_t(a, fc2_weight, fc2_bias)
    return y.view(*x.shape[:-1], y.shape[1]), z if save else z.new_empty(0)


def mlp_bwd(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    approximate: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """See csrc/kernels.h: MlpBwd. Gradients that are not needed are empty."""
    dy, rows = as_rows(dy), as_rows(x)
    grads = [x.new_empty(0) for _ in needs]
    if needs[4]:
        grads[4] = dy.sum(0)
    if any(needs[:4]):
        dz = matmul(dy, fc2_weight)  # of gelu(z) at first
        a = torch.empty_like(z) if needs[3] else None
        dbias1 = _gelu_bwd(z, a, dz, approximate)
        if needs[0]:
            grads[0] = matmul(dz, fc1_weight).view(x.shape)
        if needs[1]:
            grads[1] = matmul(dz.t(), rows)
        if needs[2]:
            grads[2] = dbias1.to(x.dtype)
        if a is not None:
            grads[3] = matmul(dy.t(), a)
    return tuple(grads)


def _gelu_bwd(z: Tensor, a: Tensor | None, dz: Tensor, approximate: str) -> Tensor:
    dbias = torch.zeros(z.shape[1])
    if z.numel() > 0:
        scratch = torch.empty(_C.row_chunks(z.shape[0]), z.shape[1])
        _C.mlp_bwd(
            ptr(z),
            ptr(a),
            ptr(dz),
            ptr(dbias),
            ptr(scratch),
            *z.shape,
            DTYPE[z.dtype],
            approximate == "tanh",
            torch.get_num_threads(),
        )
    return dbias
