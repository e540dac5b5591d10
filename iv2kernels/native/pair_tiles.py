"""How contrastive_loss and siglip_loss reach csrc/cpu/pair_tiles.h: labels, scratch, gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr


def labels_and_counts(ids: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Ids as whole float32 numbers that kernels compare, and how many rows share each."""
    if ids is None:
        return torch.arange(rows, dtype=torch.float32), torch.ones(rows)
    _, labels, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return labels.float(), counts[labels].float()


def scratch(columns: int, dim: int, backward: bool, threads: int) -> tuple[Tensor, Tensor]:
    """Memory of a strip of rows, and of the threads' tiles."""
    strip = torch.empty(_C.pair_strip_scratch(columns, dim, backward))
    return strip, torch.empty(threads, _C.pair_tile_scratch(dim))


def gradients(
    kernel: Callable[..., None],
    dloss: Tensor,
    v: Tensor,
    t: Tensor,
    stats: Tensor,
    scale: float,
    bias: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, float, float]:
    """Of all pairs of as many rows. The last rows of stats are labels and 1 / counts."""
    if len(v) == 0:
        dv, dt = (v.new_zeros(v.shape if need else 0) for need in needs)
        return dv, dt, 0.0, 0.0
    labels, counts = (stats[-2], stats[-1]) if stats.dim() > 1 else (stats, None)
    parts = (labels, labels, counts, stats)
    dv, dt, dscale, dbias = block_gradients(kernel, float(dloss), (v, t), parts, scale, bias, needs)
    return dv.to(v.dtype), dt.to(v.dtype), dscale, dbias


def block_gradients(
    kernel: Callable[..., None],
    dloss: float,
    pair: tuple[Tensor, Tensor],  # [M, D], [N, D]
    parts: tuple[Tensor, Tensor, Tensor | None, Tensor],
    scale: float,
    bias: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, float, float]:
    """See csrc/kernels.h: PairLossBwd. Gradients in float32; those not needed are empty.

    parts: labels [M], column_labels [N], inverse_counts [M] and stats.
    """
    v, t = (x.contiguous() for x in pair)
    labels, column_labels, counts, stats = parts
    (rows, dim), columns, threads = v.shape, len(t), torch.get_num_threads()
    grads = [
        torch.empty(len(x), -(-dim // 16) * 16) if need else None
        for x, need in zip((v, t), needs, strict=True)
    ]
    sums = torch.empty(2, dtype=torch.float64)
    block_sums = torch.empty(_C.pair_blocks(columns), 2, dtype=torch.float64)
    strip, tiles = scratch(columns, dim, True, threads)
    kernel(
        ptr(v),
        ptr(t),
        ptr(labels),
        ptr(column_labels),
        ptr(counts),
        ptr(stats),
        ptr(grads[0]),
        ptr(grads[1]),
        ptr(sums),
        ptr(block_sums),
        ptr(strip),
        ptr(tiles),
        rows,
        columns,
        dim,
        DTYPE[v.dtype],
        scale,
        bias,
        dloss,
        threads,
    )
    dv, dt = (torch.empty(0) if g is None else g[:, :dim].contiguous() for g in grads)
    dscale, dbias = sums.tolist()
    return dv, dt, dscale, dbias
