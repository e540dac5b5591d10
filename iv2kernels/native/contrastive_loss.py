"""contrastive_loss on csrc/cpu/contrastive_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr
from iv2kernels.native.pair_tiles import block_gradients, gradients, labels_and_counts, scratch
from iv2kernels.ops.contrastive_loss import check_temperature


def contrastive_loss_fwd(
    v: Tensor, t: Tensor, temperature: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: PairLossFwd. The second result is its stats, labels and 1 / counts."""
    value = float(temperature)
    check_temperature(value)
    rows = len(v)
    loss = torch.full((), torch.nan)
    stats = torch.empty(6, rows)
    if rows == 0:
        return loss, stats
    labels, counts = labels_and_counts(ids, rows)
    stats[4], stats[5] = labels, 1 / counts
    sums = torch.empty(3, rows)
    _forward((v, t), (stats[4], stats[4], stats[5], stats), sums, loss, 1 / value)
    return loss, stats


def statistics(
    pair: tuple[Tensor, Tensor],  # [M, D], [N, D]
    labels: tuple[Tensor, Tensor],  # [M], [N] float32
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A part of a larger loss: what its rows and columns have, and how much its positives are.

    Returns:
        [3, M] and [3, N]: the maximum, how often it occurs, and the sum of the other e^(s -
        maximum); and [M] the sums of positive logits.
    """
    rows, columns = (len(x) for x in pair)
    stats, sums = torch.empty(2 * rows + 2 * columns), torch.empty(2 * rows + columns)
    _forward(pair, (*labels, None, stats), sums, None, scale)
    row_max, row_rest, column_max, column_rest = stats.split([rows, rows, columns, columns])
    positives, row_ties, column_ties = sums.split([rows, rows, columns])
    return (
        torch.stack([row_max, row_ties, row_rest]),
        torch.stack([column_max, column_ties, column_rest]),
        positives,
    )


def part_gradients(
    dloss: float,
    pair: tuple[Tensor, Tensor],  # [M, D], [N, D]
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, float]:
    """Gradients of a part of a larger loss, float32, and that of the scale; as block_gradients."""
    dv, dt, dscale, _ = block_gradients(
        _C.contrastive_loss_bwd, dloss, pair, parts, scale, 0.0, needs
    )
    return dv, dt, dscale


def _forward(
    pair: tuple[Tensor, Tensor],
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor],
    sums: Tensor,
    loss: Tensor | None,
    scale: float,
) -> None:
    """See csrc/kernels.h: PairLossFwd; parts as in block_gradients."""
    v, t = (x.contiguous() for x in pair)
    (rows, dim), columns, threads = v.shape, len(t), torch.get_num_threads()
    labels, column_labels, counts, stats = parts
    strip, tiles = scratch(columns, dim, False, threads)
    _C.contrastive_loss_fwd(
        ptr(v),
        ptr(t),
        ptr(labels),
        ptr(column_labels),
        ptr(counts),
        ptr(stats),
        ptr(sums),
        ptr(loss),
        None,
        ptr(strip),
        ptr(tiles),
        rows,
        columns,
        dim,
        DTYPE[v.dtype],
        scale,
        0.0,
        threads,
    )


def contrastive_loss_bwd(
    dloss: Tensor, v: Tensor, t: Tensor, temperature: Tensor, stats: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: PairLossBwd. Gradients that are not needed are empty."""
    scale = 1 / float(temperature)
    dv, dt, dscale, _ = gradients(_C.contrastive_loss_bwd, dloss, v, t, stats, scale, 0.0, needs)
    return dv, dt, torch.full_like(temperature, -dscale * scale**2)
