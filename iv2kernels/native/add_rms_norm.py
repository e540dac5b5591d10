"""add_rms_norm on csrc/cpu/add_rms_norm.cpp and csrc/cuda/add_rms_norm.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, contiguous, floats, on_cuda, place, ptr


def _rows_per_sample(shape: torch.Size) -> int:
    rows = 1
    for size in shape[1:-1]:
        rows *= size
    return max(rows, 1)


def add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AddRmsNormFwd."""
    x, residual = x.contiguous(), contiguous(residual)
    weight, layer_scale, drop_scale = weight.float(), floats(layer_scale), floats(drop_scale)
    weight = weight.contiguous()
    y = torch.empty_like(x)
    r = torch.empty_like(x if residual is None else residual)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, r, rstd
    _C.add_rms_norm_fwd(
        ptr(x),
        ptr(residual),
        ptr(weight),
        ptr(layer_scale),
        ptr(drop_scale),
        ptr(y),
        ptr(r),
        ptr(rstd),
        rstd.numel(),
        x.shape[-1],
        _rows_per_sample(x.shape),
        DTYPE[x.dtype],
        DTYPE[r.dtype],
        float(eps),
        *place(x),
    )
    return y, r, rstd


def add_rms_norm_bwd(
    dy: Tensor | None,
    dr: Tensor | None,
    x: Tensor | None,
    r: Tensor,
    rstd: Tensor,
    weight: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AddRmsNormBwd."""
    rows, dim = rstd.numel(), r.shape[-1]
    dy, dr, x = contiguous(dy), contiguous(dr, r.dtype), contiguous(x)
    weight, layer_scale, drop_scale = weight.float(), floats(layer_scale), floats(drop_scale)
    weight = weight.contiguous()
    dx, dresidual = torch.empty_like(r, dtype=x_dtype), torch.empty_like(r)
    dweight, dlayer_scale = torch.zeros(dim, device=r.device), torch.zeros(dim, device=r.device)
    if rows == 0 or dim == 0:
        return dx, dresidual, dweight, dlayer_scale
    chunks = _C.cuda_row_chunks(rows) if on_cuda(r) else _C.row_chunks(rows)
    scratch = torch.empty(2, chunks, dim, device=r.device)
    _C.add_rms_norm_bwd(
        ptr(dy),
        ptr(dr),
        ptr(x),
        ptr(r),
        ptr(rstd),
        ptr(weight),
        ptr(layer_scale),
        ptr(drop_scale),
        ptr(dx),
        ptr(dresidual),
        ptr(dweight),
        ptr(dlayer_scale if x is not None else None),
        ptr(scratch),
        rows,
        dim,
        _rows_per_sample(r.shape),
        DTYPE[x_dtype],
        DTYPE[r.dtype],
        *place(r),
    )
    return dx, dresidual, dweight, dlayer_scale
