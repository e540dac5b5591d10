"""distill_loss on csrc/cpu/distill_loss.cpp and csrc/cuda/distill_loss.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, on_cuda, place, ptr


def _rows(ids: Tensor | None, target_rows: int) -> Tensor | None:
    if ids is None or ids.numel() == 0:
        return None
    if not on_cuda(ids):
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= target_rows:
            raise ValueError(
                f"distill_loss: ids must be in [0, {target_rows}), got {low if low < 0 else high}"
            )
    return ids.long().contiguous()


def _unit(rows: int, dim: int) -> float:
    # A power of two: scaling by it rounds nothing.
    return 2.0 ** (rows * dim).bit_length()


def distill_loss_fwd(
    x: Tensor,
    target: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    ids: Tensor | None,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: DistillLossFwd."""
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    ids = _rows(ids, target.shape[1])
    x, target = x.contiguous(), target.contiguous()
    if target.dtype not in DTYPE:
        target = target.float()
    weight, bias = norm_weight.float().contiguous(), norm_bias.float().contiguous()
    loss = torch.full((), torch.nan, device=x.device)
    dx = torch.empty(x.shape if needs[0] else 0, dtype=x.dtype, device=x.device)
    dweight = torch.zeros(dim if needs[1] else 0, device=x.device)
    dbias = torch.zeros_like(dweight)
    if rows == 0 or dim == 0:
        return loss, dx, dweight, dbias
    chunks = _C.cuda_row_chunks(rows) if on_cuda(x) else _C.row_chunks(rows)
    sums = torch.empty(chunks, dtype=torch.float64, device=x.device)
    scratch = torch.empty(2, chunks, dim, device=x.device) if needs[1] else None
    _C.distill_loss_fwd(
        ptr(x),
        ptr(target),
        ptr(ids),
        ptr(weight),
        ptr(bias),
        ptr(loss),
        ptr(dx) if needs[0] else 0,
        ptr(dweight) if needs[1] else 0,
        ptr(dbias) if needs[1] else 0,
        ptr(sums),
        ptr(scratch),
        rows,
        dim,
        x.shape[1],
        target.shape[1],
        DTYPE[x.dtype],
        DTYPE[target.dtype],
        float(eps),
        _unit(rows, dim),
        *place(x),
    )
    return loss, dx, dweight, dbias


def distill_loss_bwd(
    dloss: Tensor, dx_unit: Tensor, dweight_unit: Tensor, dbias_unit: Tensor, rows: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: DistillLossBwd."""
    unit = _unit(rows, dim)
    # on a GPU the kernel alone knows the value
    known = 1.0 if on_cuda(dloss) else float(dloss)
    unknown = dloss.float() if on_cuda(dloss) else None
    dx = torch.empty_like(dx_unit)
    if dx.numel() > 0:
        _C.distill_loss_bwd(
            ptr(dx_unit),
            ptr(unknown),
            ptr(dx),
            rows,
            dim,
            DTYPE[dx.dtype],
            known / unit,
            *place(dx),
        )
    scale = known / unit if unknown is None else unknown / unit
    return dx, dweight_unit * scale, dbias_unit * scale
