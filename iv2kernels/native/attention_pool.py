"""attention_pool on csrc/cpu/attention_pool.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, ptr


def attention_pool_fwd(
    x: Tensor, query: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See csrc/kernels.h: AttentionPoolFwd. Returns z, probs, (mean, rstd), logits and p."""
    (batch, tokens, dim), heads = x.shape, query.shape[1]
    lanes = (heads + 15) // 16 * 16
    x, query = x.contiguous(), query.float().contiguous()
    z, probs = torch.empty(query.shape, dtype=x.dtype), torch.empty(batch, tokens)
    stats = torch.empty(2, batch, tokens)
    logits, p = torch.empty(batch, tokens, lanes), torch.empty(batch, tokens, lanes)
    if x.numel() == 0 or query.numel() == 0:
        return z.zero_(), probs.zero_(), stats, logits, p
    transposed = torch.empty(batch, dim, lanes)
    _C.attention_pool_fwd(
        ptr(x),
        ptr(query),
        ptr(z),
        ptr(probs),
        ptr(stats[0]),
        ptr(stats[1]),
        ptr(logits),
        ptr(p),
        ptr(transposed),
        batch,
        tokens,
        heads,
        lanes,
        dim,
        DTYPE[x.dtype],
        float(eps),
        torch.get_num_threads(),
    )
    return z, probs, stats, logits, p


def attention_pool_bwd(
    dz: Tensor,
    x: Tensor,
    query: Tensor,
    stats: Tensor,
    logits: Tensor,
    p: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: AttentionPoolBwd. Gradients that are not needed are empty."""
    (batch, tokens, dim), (_, heads, _) = x.shape, query.shape
    lanes = logits.shape[2]
    x, query, dz = x.contiguous(), query.float().contiguous(), dz.float().contiguous()
    dx = torch.empty(x.shape if needs[0] else 0, dtype=x.dtype)
    dquery = torch.empty(query.shape if needs[1] else 0)
    if x.numel() == 0 or query.numel() == 0:
        return dx.zero_(), dquery.zero_()
    transposed, dp = torch.empty(batch, dim, lanes), torch.empty(batch, tokens, lanes)
    sums, means = torch.empty(batch, 3, lanes), torch.empty(2, batch, tokens)
    _C.attention_pool_bwd(
        ptr(x),
        ptr(query),
        ptr(dz),
        ptr(stats[0]),
        ptr(stats[1]),
        ptr(logits),
        ptr(p),
        ptr(dx) if needs[0] else 0,
        ptr(dquery) if needs[1] else 0,
        ptr(transposed),
        ptr(dp),
        ptr(sums),
        ptr(means),
        batch,
        tokens,
        heads,
        lanes,
        dim,
        DTYPE[x.dtype],
        torch.get_num_threads(),
    )
    return dx, dquery
