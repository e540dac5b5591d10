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


def scratch(rows: int, dim: int, backward: bool, threads: int) -> tuple[Tensor, Tensor]:
    """Memory of a strip of rows, and of the threads' tiles."""
    strip = torch.empty(_C.pair_strip_scratch(rows, dim, backward))
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
    """See csrc/kernels.h: PairLossBwd. The last rows of stats are labels and 1 / counts."""
    rows, dim = v.shape
    if rows == 0:
        dv, dt = (v.new_zeros(v.shape if need else 0) for need in needs)
        return dv, dt, 0.0, 0.0
    labels, counts = (stats[-2], stats[-1]) if stats.dim() > 1 else (stats, None)
    v, t, threads = v.contiguous(), t.contiguous(), torch.get_num_threads()
    grads = [torch.empty(rows, -(-dim // 16) * 16) if need else None for need in needs]
    sums = torch.empty(2, dtype=torch.float64)
    block_sums = torch.empty(_C.pair_blocks(rows), 2, dtype=torch.float64)
    strip, tiles = scratch(rows, dim, True, threads)
    kernel(
        ptr(v),
        ptr(t),
        ptr(labels),
        ptr(counts),
        ptr(stats),
        ptr(grads[0]),
        ptr(grads[1]),
        ptr(sums),
        ptr(block_sums),
        ptr(strip),
        ptr(tiles),
        rows,
        dim,
        DTYPE[v.dtype],
        scale,
        bias,
        float(dloss),
        threads,
    )
    dv, dt = (v.new_empty(0) if g is None else g[:, :dim].to(v.dtype).contiguous() for g in grads)
    dscale, dbias = sums.tolist()
    return dv, dt, dscale, dbias
