"""patch_embed in Triton: visible tubelets are copied to rows, then one GEMM with an epilogue.

Gather: one program for some tubelets and all their pixels, normalised if they are bytes, in rows
that are padded with zeros to a multiple of 16 bytes; the row of the CLS token is zero. A tubelet's
runs of pixels are too short and too crooked to be fetched by the GEMM itself, again for each block
of columns. Bound by memory.
GEMM: 64 x 128 tiles over the tubelet's pixels, the serial axis; the epilogue adds bias and position
or, in the row of the CLS token, that token and its position, in float32, and rounds once. Bound by
the tensor cores; float32 is multiplied in full precision.
Backward: the tubelets are copied again, and what is left are GEMMs and sums of torch's, and the
scatter-add of gather_tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD, grid_of
from iv2kernels.triton.gather_tokens import scatter_add


@triton.jit(do_not_specialize=["rows", "keep", "tokens", "grid_h", "grid_w"])
def _patch_embed_gather_kernel(
    video,
    ids,
    patches,
    rows,
    keep,
    tokens,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    sample, place = row // (FIRST + keep), row % (FIRST + keep) - FIRST
    inside = (row < rows) & (place >= 0)
    mask = inside[:, None] & (k < 3 * T * P * P)[None, :]
    known = mask
    if ids is not None:
        index = tl.load(ids + sample * keep + place, mask=inside, other=0)
        known = mask & ((index >= 0) & (index < tokens))[:, None]
        place = index.to(tl.int32)
    corner = sample.to(tl.int64) * stride_b
    corner += (place // (grid_h * grid_w) * T).to(tl.int64) * stride_t
    corner += (place // grid_w % grid_h * P).to(tl.int64) * stride_h
    corner += (place % grid_w * P).to(tl.int64) * stride_w
    channel = k // (T * P * P)
    pixel = channel.to(tl.int64) * stride_c + (k // (P * P) % T).to(tl.int64) * stride_t
    pixel += (k // P % P).to(tl.int64) * stride_h + (k % P).to(tl.int64) * stride_w
    value = tl.load(video + corner[:, None] + pixel[None, :], mask=known, other=0)
    value = value.to(tl.float32)
    if MEAN is not None:
        mean = tl.where(channel == 0, MEAN[0], tl.where(channel == 1, MEAN[1], MEAN[2]))
        std = tl.where(channel == 0, STD[0], tl.where(channel == 1, STD[1], STD[2]))
        value = tl.div_rn(tl.div_rn(value, 255.0) - mean[None, :], std[None, :])
        value = tl.where(mask, value, 0.0)
    if ids is not None:  # a tubelet that there is none of is NaN
        value = tl.where(mask & ~known, float("nan"), value)
    to = row.to(tl.int64)[:, None] * K + k[None, :]
    stored = (row < rows)[:, None] & (k < K)[None, :]
    tl.store(patches + to, value.to(patches.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "keep", "tokens"])
def _patch_embed_gemm_kernel(
    patches,
    weight,
    bias,
    pos_embed,
    cls_token,
    ids,
    out,
    rows,
    keep,
    tokens,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = patches + row.to(tl.int64)[:, None] * K_PADDED + k[None, :]
    b = weight + col[None, :] * K + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a_mask = (row < rows)[:, None] & (k < K_PADDED - start)[None, :]
        b_mask = (col < C)[None, :] & (k < K - start)[:, None]
        a_tile = tl.load(a + start, mask=a_mask, other=0.0)
        b_tile = tl.load(b + start, mask=b_mask, other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
    sample, place = row // (FIRST + keep), row % (FIRST + keep) - FIRST
    inside = (row < rows) & (place >= 0)
    if bias is not None:
        added = tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)
        total += tl.where(inside[:, None], added[None, :], 0.0)
    if cls_token is not None:
        added = tl.load(cls_token + col, mask=col < C, other=0.0).to(tl.float32)
        total += tl.where((place < 0)[:, None], added[None, :], 0.0)
    mask = (row < rows)[:, None] & (col < C)[None, :]
    if pos_embed is not None:
        mask_of_table = mask
        if ids is not None:
            index = tl.load(ids + sample * keep + place, mask=inside, other=-FIRST)
            known = (index < tokens) & (index >= tl.where(inside, 0, -FIRST))
            mask_of_table = mask & known[:, None]  # the rest is NaN already
            place = index.to(tl.int32)
        position = pos_embed + (place + FIRST).to(tl.int64)[:, None] * C + col[None, :]
        total += tl.load(position, mask=mask_of_table, other=0.0).to(tl.float32)
    to = out + row.to(tl.int64)[:, None] * C + col[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


def _tubelets(video: Tensor, weight: Tensor, ids: Tensor | None, first: int) -> Tensor:
    """[B * (first + N_keep), 3 t p p] and zeros up to 16 bytes, in weight's dtype."""
    frames, height, width = grid_of(video, weight)
    _, _, tubelet, patch, _ = weight.shape
    keep = frames * height * width if ids is None else ids.shape[1]
    rows, size = video.shape[0] * (first + keep), 3 * tubelet * patch * patch
    unit = 16 // weight.element_size()
    padded = triton.cdiv(size, unit) * unit
    patches = torch.empty(rows, padded, dtype=weight.dtype, device=weight.device)
    if rows == 0:
        return patches
    is_bytes = video.dtype == torch.uint8
    b, *strides = video.stride()
    t, h, w, c = strides if is_bytes else (*strides[1:], strides[0])
    columns = triton.next_power_of_2(padded)
    tile_rows = max(2048 // columns, 1)
    _patch_embed_gather_kernel[(triton.cdiv(rows, tile_rows),)](
        video,
        ids,
        patches,
        rows,
        keep,
        frames * height * width,
        height,
        width,
        *(b, c, t, h, w),
        FIRST=first,
        T=tubelet,
        P=patch,
        MEAN=IMAGENET_MEAN if is_bytes else None,
        STD=IMAGENET_STD if is_bytes else None,
        K=padded,
        ROWS=tile_rows,
        COLS=columns,
        num_warps=4,
        enable_fp_fusion=True,
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
    """See iv2kernels/ops/patch_embed.py."""
    first, dim, batch = 0 if cls_token is None else 1, weight.shape[0], video.shape[0]
    frames, height, width = grid_of(video, weight)
    keep = frames * height * width if ids_keep is None else ids_keep.shape[1]
    ids = contiguous(ids_keep)
    patches = _tubelets(video, weight, ids, first)
    rows = patches.shape[0]
    out = torch.empty(batch, first + keep, dim, dtype=weight.dtype, device=weight.device)
    if out.numel():
        wide = weight.dtype == torch.float32
        block_m, block_n, block_k = (64, 64, 32) if wide else (64, 128, 64)
        _patch_embed_gemm_kernel[(triton.cdiv(rows, block_m), triton.cdiv(dim, block_n))](
            patches,
            weight.contiguous(),
            contiguous(bias),
            contiguous(pos_embed),
            contiguous(cls_token),
            ids,
            out,
            rows,
            keep,
            frames * height * width,
            FIRST=first,
            C=dim,
            K=weight[0].numel(),
            K_PADDED=patches.shape[1],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
            enable_fp_fusion=True,
            num_stages=3,
        )
    return out


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
    first, dim, batch = int(has_cls), weight.shape[0], dy.shape[0]
    frames, rows, columns = grid_of(video, weight)
    tokens = frames * rows * columns
    ids = ids_keep
    if ids is None and (need_video or need_pos):
        ids = torch.arange(tokens, dtype=torch.int32, device=dy.device).expand(batch, tokens)
    ids = contiguous(ids)

    def none(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(0, dtype=dtype, device=dy.device)

    dvideo, dweight, dbias = none(video.dtype), none(weight.dtype), none()
    dpos_embed, dcls_token = none(pos_dtype), none()
    dy = dy.contiguous()
    if need_weight:
        # the rows of the CLS token are zero
        patches = _tubelets(video, weight, None if ids_keep is None else ids, first)
        dweight = torch.mm(dy.view(-1, dim).t(), patches)[:, : weight[0].numel()]
        dweight = dweight.contiguous().view(weight.shape)
    if need_bias:
        dbias = dy[:, first:].sum((0, 1), dtype=torch.float32)
    if has_cls and (need_cls or need_pos):
        dcls_token = dy[:, 0].sum(0, dtype=torch.float32)
    if need_pos and ids is not None:
        dpos_embed = torch.empty(first + tokens, dim, dtype=pos_dtype, device=dy.device)
        scatter_add(dy[:, first:], ids, dpos_embed[None, first:])
        if has_cls:
            dpos_embed[0] = dcls_token
    if need_video and ids is not None:
        dvideo = _video_grad(dy[:, first:], video, weight, ids)
    return dvideo, dweight, dbias, dpos_embed, dcls_token if need_cls else none()


def _video_grad(
    dy: Tensor,  # [B, N_keep, C]
    video: Tensor,  # [B, 3, T, H, W]
    weight: Tensor,  # [C, 3, t, p, p]
    ids: Tensor,  # [B, N_keep]
) -> Tensor:
    (batch, _, _, height, width), (dim, _, t, p, _) = video.shape, weight.shape
    frames, rows, columns = grid_of(video, weight)
    dpatches = dy @ weight.reshape(dim, 3 * t * p * p)
    whole = torch.empty(
        batch, frames * rows * columns, dpatches.shape[2], dtype=dy.dtype, device=dy.device
    )
    scatter_add(dpatches, ids, whole)
    # [B, T/t, H/p, W/p, 3, t, p, p] -> [B, 3, T/t, t, H/p, p, W/p, p]
    whole = whole.view(batch, frames, rows, columns, 3, t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return whole.reshape(batch, 3, frames * t, height, width).to(video.dtype)
