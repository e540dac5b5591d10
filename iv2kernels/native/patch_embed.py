"""patch_embed on csrc/cpu/patch_embed.cpp and csrc/cuda/patch_embed.cu, around torch's GEMM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from iv2kernels import _C
from iv2kernels.library.linear import matmul, matmul_t
from iv2kernels.native.gather_tokens import checked_ids, scatter_add
from iv2kernels.native.memory import DTYPE, contiguous, floats, on_cuda, place, ptr
from iv2kernels.ops.patch_embed import grid_of, normalize

# Rows in one product of the weight's gradient. Relative error at 1668 rows: 2.5e-7 in one product,
# 2.4e-7 with 448, 2.0e-7 with 224; the dense convolution's, most of whose terms are zero, 1.6e-7.
_SHORT = 224
_TABLES: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _gemm_dtype(weight: Tensor) -> torch.dtype:
    # Few CPUs multiply float16.
    is_narrow = weight.dtype == torch.float16 and not on_cuda(weight)
    return torch.float32 if is_narrow else weight.dtype


def _matmul_t(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if on_cuda(x) else matmul_t(x, weight)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if on_cuda(a) else matmul(a, b)


def _byte_table(device: torch.device, dtype: torch.dtype) -> Tensor:  # [3, 256]
    if (device, dtype) not in _TABLES:
        values = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 3)
        _TABLES[device, dtype] = normalize(values).t().to(device, dtype).contiguous()
    return _TABLES[device, dtype]


def _strides(video: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The video, and its strides for sample, channel, frame, row and column."""
    if video.dtype == torch.uint8:
        if video.stride(4) != 1 or video.stride(3) != 3:
            video = video.contiguous()
        b, t, h, w, c = video.stride()
        return video, (b, c, t, h, w)
    if video.dtype == torch.float64:
        video = video.float()
    if video.stride(4) != 1:
        video = video.contiguous()
    return video, video.stride()


def _tubelets(video: Tensor, weight: Tensor, ids: Tensor | None, first: int) -> Tensor:
    """[B * (first + N_keep), 3 t p p] in what the GEMM takes; the CLS rows are zero."""
    grid = grid_of(video, weight)
    _, _, tubelet, patch, _ = weight.shape
    keep = grid[0] * grid[1] * grid[2] if ids is None else ids.shape[1]
    video, strides = _strides(video)
    dtype, device = _gemm_dtype(weight), weight.device
    rows = video.shape[0] * (first + keep)
    patches = torch.empty(rows, 3 * tubelet * patch * patch, dtype=dtype, device=device)
    if patches.numel():
        _C.patch_embed_gather(
            ptr(video),
            ptr(ids),
            ptr(_byte_table(device, dtype) if video.dtype == torch.uint8 else None),
            ptr(patches),
            video.shape[0],
            keep,
            first,
            *grid,
            tubelet,
            patch,
            *strides,
            DTYPE[video.dtype],
            DTYPE[dtype],
            *place(video),
        )
    return patches


def patch_embed_fwd(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cls_token: Tensor | None,
    ids_keep: Tensor | None,
) -> Tensor:
    """See csrc/kernels.h: PatchEmbedGather and PatchEmbedAdd."""
    first, dim, batch = 0 if cls_token is None else 1, weight.shape[0], video.shape[0]
    frames, rows, columns = grid_of(video, weight)
    tokens = frames * rows * columns
    if ids_keep is not None:
        ids_keep = checked_ids("patch_embed", "ids_keep", ids_keep, tokens)
    patches = _tubelets(video, weight, ids_keep, first)
    y = _matmul_t(patches, weight.reshape(dim, patches.shape[1]).to(patches.dtype))
    y = y.to(patches.dtype)  # autocast may have chosen another
    keep = tokens if ids_keep is None else ids_keep.shape[1]
    out = y if y.dtype == weight.dtype else torch.empty_like(y, dtype=weight.dtype)
    if y.numel():
        bias, cls_token = floats(bias), floats(cls_token)
        if pos_embed is not None and pos_embed.dtype not in DTYPE:
            pos_embed = pos_embed.float()
        pos_embed = contiguous(pos_embed)
        _C.patch_embed_add(
            ptr(y),
            ptr(bias),
            ptr(pos_embed),
            ptr(cls_token),
            ptr(ids_keep),
            ptr(out),
            batch,
            keep,
            first,
            tokens,
            dim,
            DTYPE[out.dtype],
            DTYPE[torch.float32 if pos_embed is None else pos_embed.dtype],
            *place(out),
        )
    return out.view(batch, first + keep, dim)


def patch_embed_bwd(
    dy: Tensor,
    video: Tensor,
    weight: Tensor,
    ids_keep: Tensor | None,
    has_cls: bool,
    pos_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of video, weight, bias, pos_embed and cls_token; those not needed are empty."""
    need_video, need_weight, need_bias, need_pos, need_cls = needs
    first, dim, dy = int(has_cls), weight.shape[0], dy.contiguous()
    frames, rows, columns = grid_of(video, weight)
    tokens = frames * rows * columns
    ids = ids_keep
    if ids is None and (need_video or need_pos):
        ids = torch.arange(tokens, device=dy.device).expand(dy.shape[0], tokens)
    ids = contiguous(ids, torch.int32)
    dvideo, dweight = video.new_empty(0), weight.new_empty(0)
    dbias, dcls_token = _no_floats(dy), _no_floats(dy)
    dpos_embed = dy.new_empty(0, dtype=pos_dtype)
    if need_weight:
        # the CLS rows of the tubelets are zero
        patches = _tubelets(video, weight, None if ids_keep is None else ids, first)
        dy2 = dy.view(len(patches), dim).to(patches.dtype)
        dweight = _weight_grad(dy2, patches).view(weight.shape).to(weight.dtype)
    if need_bias or need_cls or (need_pos and has_cls):
        dbias, dcls_token = _row_sums(dy, first)
    if need_pos and ids is not None:
        dpos_embed = dy.new_empty(1, first + tokens, dim, dtype=pos_dtype)
        scatter_add(dy[:, first:], ids, dpos_embed[:, first:])
        if has_cls:
            dpos_embed[0, 0] = dcls_token
        dpos_embed = dpos_embed[0]
    if need_video and ids is not None:
        dvideo = _video_grad(dy, video, weight, ids, first)
    return (
        dvideo,
        dweight,
        dbias if need_bias else _no_floats(dy),
        dpos_embed,
        dcls_token if need_cls else _no_floats(dy),
    )


def _no_floats(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _weight_grad(dy: Tensor, patches: Tensor) -> Tensor:
    """``dy.T @ patches``; on the CPU in float32 as a sum of short products, which rounds less."""
    if dy.dtype != torch.float32 or len(dy) <= _SHORT or on_cuda(dy):
        return _matmul(dy.t(), patches)
    total = torch.zeros(dy.shape[1], patches.shape[1])
    for rows, tubelets in zip(dy.split(_SHORT), patches.split(_SHORT), strict=True):
        total.addmm_(rows.t(), tubelets)
    return total


def _row_sums(dy: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """See csrc/kernels.h: PatchEmbedBwd."""
    batch, keep, dim = dy.shape[0], dy.shape[1] - first, dy.shape[2]
    dbias, dcls_token = torch.zeros(dim, device=dy.device), torch.zeros(dim, device=dy.device)
    if dy.numel():
        chunks = (_C.cuda_row_chunks if on_cuda(dy) else _C.row_chunks)(batch * keep)
        scratch = torch.empty(chunks, dim, device=dy.device)
        _C.patch_embed_bwd(
            ptr(dy),
            ptr(dbias),
            ptr(dcls_token if first else None),
            ptr(scratch),
            batch,
            keep,
            first,
            dim,
            DTYPE[dy.dtype],
            *place(dy),
        )
    return dbias, dcls_token


def _video_grad(
    dy: Tensor,  # [B, first + N_keep, C]
    video: Tensor,  # [B, 3, T, H, W]
    weight: Tensor,  # [C, 3, t, p, p]
    ids: Tensor,  # int32 [B, N_keep]
    first: int,
) -> Tensor:
    (batch, _, _, height, width), (dim, _, t, p, _) = video.shape, weight.shape
    frames, rows, columns = grid_of(video, weight)
    dtype = _gemm_dtype(weight)
    flat = weight.reshape(dim, 3 * t * p * p).to(dtype)
    dpatches = _matmul(dy.view(-1, dim).to(dtype), flat).view(*dy.shape[:2], flat.shape[1])
    whole = flat.new_empty(batch, frames * rows * columns, flat.shape[1])
    scatter_add(dpatches[:, first:], ids, whole)
    # [B, T/t, H/p, W/p, 3, t, p, p] -> [B, 3, T/t, t, H/p, p, W/p, p]
    whole = whole.view(batch, frames, rows, columns, 3, t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return whole.reshape(batch, 3, frames * t, height, width).to(video.dtype)
