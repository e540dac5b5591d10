"""gather_tokens on csrc/cpu/gather_tokens.cpp and csrc/cuda/gather_tokens.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from iv2kernels import _C
from iv2kernels.native.memory import DTYPE, contiguous, on_cuda, place, ptr


def checked_ids(op: str, argument: str, ids: Tensor, limit: int) -> Tensor:
    """Ids as contiguous int32, every one in [0, limit); on a GPU the kernel looks for itself.

    Raises:
        ValueError: one is not.
    """
    if ids.numel() and not on_cuda(ids):
        for bad in torch.stack(torch.aminmax(ids)).tolist():
            if not 0 <= bad < limit:
                raise ValueError(f"{op}: {argument} must be in [0, {limit}), got {bad}")
    return ids.to(torch.int32).contiguous()


def gather_tokens_fwd(x: Tensor, ids: Tensor, add: Tensor | None) -> Tensor:
    """See csrc/kernels.h: GatherTokensFwd."""
    dtype = x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)
    ids = checked_ids("gather_tokens", "ids", ids, x.shape[1])
    if x.stride(2) != 1:
        x = x.contiguous()
    add = contiguous(add, dtype)
    y = torch.empty(*ids.shape, x.shape[2], dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    _C.gather_tokens_fwd(
        ptr(x),
        ptr(ids),
        ptr(add),
        ptr(y),
        len(y),
        x.shape[1],
        *y.shape[1:],
        0 if x.shape[0] == 1 else x.stride(0),
        x.stride(1),
        DTYPE[x.dtype],
        DTYPE[dtype],
        *place(x),
    )
    return y


def gather_tokens_bwd(
    dy: Tensor, ids: Tensor, samples: int, tokens: int, x_dtype: torch.dtype
) -> Tensor:
    """See csrc/kernels.h: GatherTokensBwd."""
    dx = torch.empty(samples, tokens, dy.shape[2], dtype=x_dtype, device=dy.device)
    scatter_add(dy, ids.to(torch.int32).contiguous(), dx)
    return dx


def scatter_add(
    dy: Tensor,  # [B, M, C]
    ids: Tensor,  # int32 [B, M], checked
    dx: Tensor,  # [B or 1, N, C], written whole
) -> None:
    """dx[b or 0, n] = the sum of dy[b, m] over ids[b, m] == n."""
    batch, keep, dim = dy.shape
    samples, tokens, _ = dx.shape
    if dx.numel() == 0:
        return
    starts = order = None
    if not on_cuda(dx):
        starts = torch.empty(samples * tokens + 2, dtype=torch.int32)
        order = torch.empty(batch * keep, dtype=torch.int32)
    if dy.stride(2) != 1 or dy.stride(1) != dim:
        dy = dy.contiguous()
    _C.gather_tokens_bwd(
        ptr(dy),
        ptr(ids),
        ptr(dx),
        ptr(starts),
        ptr(order),
        batch,
        samples,
        tokens,
        keep,
        dim,
        dy.stride(0),
        DTYPE[dy.dtype],
        DTYPE[dx.dtype],
        *place(dx),
    )
