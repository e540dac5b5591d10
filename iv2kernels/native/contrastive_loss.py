"""contrastive_loss on csrc/cpu/contrastive_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.native.pair_tiles import gradients, labels_and_counts, scratch
from iv2kernels.ops.contrastive_loss import check_temperature


def contrastive_loss_fwd(
    v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: PairLossFwd. The second result is its stats, labels and 1 / counts."""
    value = float(temperature)
    check_temperature(value)
    rows, dim = v.shape
    loss = torch.full((), torch.nan)
    stats = torch.empty(6, rows)
    if rows == 0:
        return loss, stats
    labels, counts = labels_and_counts(ids, rows)
    stats[4], stats[5] = labels, 1 / counts
    v, t, threads = v.contiguous(), t.contiguous(), torch.get_num_threads()
    sums = torch.empty(3, rows)
    strip, tiles = scratch(rows, dim, False, threads)
    _C.contrastive_loss_fwd(
        ptr(v),
        ptr(t),
        ptr(stats[4]),
        ptr(stats[5]),
        ptr(stats),
        ptr(sums),
        ptr(loss),
        None,
        ptr(strip),
        ptr(tiles),
        rows,
        dim,
        DTYPE[v.dtype],
        1 / value,
        0.0,
        threads,
    )
    return loss, stats


def contrastive_loss_bwd(
    dloss: Tensor, v: Tensor, t: Tensor, temperature: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: PairLossBwd. Gradients that are not needed are empty."""
    scale = 1 / float(temperature)
    dv, dt, dscale, _ = gradients(_C.contrastive_loss_bwd, dloss, v, t, stats, scale, 0.0, needs)
    return dv, dt, torch.full_like(temperature, -dscale * scale**2)
