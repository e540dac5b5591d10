"""siglip_loss on csrc/cpu/siglip_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.native.pair_tiles import gradients, labels_and_counts, scratch


def siglip_loss_fwd(
    v: Tensor, t: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: PairLossFwd. The second result is the rows' labels."""
    rows, dim = v.shape
    loss = torch.full((), torch.nan)
    labels, _ = labels_and_counts(ids, rows)
    if rows == 0:
        return loss, labels
    v, t, threads = v.contiguous(), t.contiguous(), torch.get_num_threads()
    block_sums = torch.empty(_C.pair_blocks(rows), dtype=torch.float64)
    strip, tiles = scratch(rows, dim, False, threads)
    _C.siglip_loss_fwd(
        ptr(v),
        ptr(t),
        ptr(labels),
        ptr(labels),
        None,
        None,
        None,
        ptr(loss),
        ptr(block_sums),
        ptr(strip),
        ptr(tiles),
        rows,
        rows,
        dim,
        DTYPE[v.dtype],
        float(scale),
        float(bias),
        threads,
    )
    return loss, labels


def siglip_loss_bwd(
    dloss: Tensor,
    v: Tensor,
    t: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: PairLossBwd. Gradients that are not needed are empty."""
    dv, dt, dscale, dbias = gradients(
        _C.siglip_loss_bwd, dloss, v, t, labels, float(scale), float(bias), needs
    )
    return dv, dt, torch.full_like(scale, dscale), torch.full_like(bias, dbias)
