"""attention in Triton: online softmax over tiles, forward and in a backward of two passes.

Forward: a program keeps a tile of queries of one head and walks over the keys that they see, the
serial axis, with a running maximum and sum. Blocks of keys that all its queries see go through a
loop without masks, the rest through a second one.
Backward: the pass over queries is forward's with the saved log-sum-exp in place of the maximum; it
gives dq, and for the second pass the log-sum-exp in base 2 and delta = sum(o * d_o) - dlse of each
query, and in float32 a factor that undoes the rounding of the former. That pass keeps a tile of
keys and walks over the queries that see them, of all the heads that share the keys: dk and dv.
Neither adds to what another program wrote, so that the same inputs give the same bits; scores are
computed three times in all.
With lists, a tile is a piece of a block, and its serial axis a list of runs. With the norm of
spatiotemporal_attention, the factors of a query go into its tile, the factor of a key into its
column of the scores; the first pass of backward stores the scaled queries for the second.
Bound by the tensor cores; float32 by the FMA units.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iv2kernels.native.memory import contiguous
from iv2kernels.triton.attention_grad import SIZES, attention_dkdv_kernel, attention_dq_kernel
from iv2kernels.triton.attention_tiles import (
    Tile,
    add_product,
    dense_tile,
    head_of,
    load_rows,
    normed_rows,
    run_of,
    scale_rows,
    scores,
    sequence_of,
    store_rows,
    tile_of,
    zero_rows,
)

_LOG2E = 1.4426950408889634


class Lists(NamedTuple):
    """What each tile sees: rows of first token, tokens, and its runs, from and to."""

    tiles: Tensor  # [num_tiles, 4] int32
    runs: Tensor  # [R, 2] int32, first token and end
    tile: Tile


class Options(NamedTuple):
    """What the op takes besides tensors; cu_seqlens None: dense."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    scale: float


class Norm(NamedTuple):
    """The norm of spatiotemporal_attention: q * rstd[0] * gain and k * rstd[1] are attended."""

    gain: Tensor  # [C] float32
    rstd: Tensor  # [2, B, N] float32


@triton.jit
def _fwd_step(
    queries,
    k,
    v,
    k_rstd,
    begin,
    end,
    last,
    factor,
    top,
    total,
    sums,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORM: tl.constexpr,
):
    """Attend to keys [begin, end), each query to those up to its last."""
    for n in tl.range(begin, end, STEP, num_stages=STAGES):
        key = n + tl.arange(0, STEP)
        s = scores(queries, load_rows(k, n, end, STEP, K_TOKEN, D, MASKED))
        if NORM:
            s *= tl.load(k_rstd + key, mask=key < end, other=0.0)[None, :]
        if MASKED:
            seen = (key < end)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= last[:, None])
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        shift = new_top
        if MASKED and CAUSAL:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet
        p = tl.exp2(tl.fma(s, factor, -shift[:, None]))
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        values = load_rows(v, n, end, STEP, V_TOKEN, D, MASKED)
        sums = add_product(scale_rows(sums, fade), p, values)
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=SIZES)
def _attention_fwd_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    tiles,
    runs,
    gain,
    q_rstd,
    k_rstd,
    o,
    lse,
    q_len,
    k_len,
    lse_stride,
    num_tiles,
    q_stride_b,
    q_stride_h,
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    factor,
    Q_TOKEN: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    LISTS: tl.constexpr,
    NORM: tl.constexpr,
):
    head = tl.program_id(0) // num_tiles % HEADS
    sequence = tl.program_id(0) // num_tiles // HEADS
    q = head_of(q, cu_seqlens_q, sequence, head, q_stride_b, q_stride_h, Q_TOKEN, UNIT, PACKED)
    k = head_of(
        k, cu_seqlens_k, sequence, head // GROUP, k_stride_b, k_stride_h, K_TOKEN, UNIT, PACKED
    )
    v = head_of(
        v, cu_seqlens_k, sequence, head // GROUP, v_stride_b, v_stride_h, V_TOKEN, UNIT, PACKED
    )
    q_first, q_len = sequence_of(cu_seqlens_q, sequence, q_len, PACKED)
    k_first, k_len = sequence_of(cu_seqlens_k, sequence, k_len, PACKED)
    first, end, run, last_run = tile_of(tiles, tl.program_id(0) % num_tiles, q_len, ROWS, LISTS)
    if PACKED:
        k_len = tl.where(first < q_len, k_len, 0)  # nothing to do in a shorter sequence
    queries = load_rows(q, first, end, ROWS, Q_TOKEN, D, True)
    if NORM:
        queries = normed_rows(queries, q_rstd + q_first, gain + head * D, first, end, ROWS, D)
        k_rstd += k_first
    if NEGATIVE:
        queries = scale_rows(queries, tl.full([ROWS], -1, queries[0].dtype))
    last = first + tl.arange(0, ROWS) + k_len - q_len
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = zero_rows(ROWS, D)
    for i in range(run, last_run):
        begin, stop = run_of(runs, i, k_len, LISTS)
        whole = stop
        if CAUSAL:
            whole = tl.minimum(k_len, first + k_len - q_len + 1)
            stop = tl.minimum(k_len, first + k_len - q_len + ROWS)
        whole = begin + tl.maximum(whole - begin, 0) // STEP * STEP
        for masked in tl.static_range(2):
            top, total, sums = _fwd_step(
                queries,
                k,
                v,
                k_rstd,
                whole if masked else begin,
                stop if masked else whole,
                last,
                factor,
                top,
                total,
                sums,
                K_TOKEN,
                V_TOKEN,
                D,
                STEP,
                STAGES,
                masked,
                CAUSAL,
                NORM,
            )
    none = total == 0.0
    sums = scale_rows(sums, 1.0 / tl.where(none, 1.0, total))
    store_rows(o + (q_first.to(tl.int64) * HEADS + head) * D, sums, first, end, ROWS, HEADS * D, D)
    row = tl.arange(0, ROWS)
    if PACKED:
        lse += head.to(tl.int64) * lse_stride + q_first
    else:
        lse += (sequence * HEADS + head).to(tl.int64) * lse_stride
    natural = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + first + row, natural, mask=row < end - first)


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _places(**tensors: Tensor) -> dict[str, int]:
    """The strides of q, k and v: of a token, and of a sequence and a head in UNITs."""
    found = {n: x.stride() if x.dim() == 4 else (0, *x.stride()) for n, x in tensors.items()}
    unit = math.gcd(16, *(stride for strides in found.values() for stride in strides[:3]))
    places = {"UNIT": unit}
    for name, (batch, token, head, _) in found.items():
        places |= {f"{name}_stride_b": batch // unit, f"{name}_stride_h": head // unit}
        places[f"{name.upper()}_TOKEN"] = token
    return places


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, options: Options, lists: Lists | None, norm: Norm | None
) -> dict[str, Any]:
    """What all three kernels take."""
    cu_q, cu_k = options.cu_seqlens_q, options.cu_seqlens_k
    return _places(q=q, k=k, v=v) | {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": contiguous(cu_q),
        "cu_seqlens_k": contiguous(cu_q if cu_k is None else cu_k),
        "tiles": None if lists is None else lists.tiles,
        "runs": None if lists is None else lists.runs,
        "k_rstd": None if norm is None else norm.rstd[1],
        "q_len": options.max_seqlen_q,
        "k_len": options.max_seqlen_k,
        "lse_stride": q.shape[-3],
        "HEADS": q.shape[-2],
        "GROUP": q.shape[-2] // k.shape[-2],
        "D": q.shape[-1],
        "CAUSAL": options.causal,
        "PACKED": cu_q is not None,
        "LISTS": lists is not None,
        "NORM": norm is not None,
        "enable_fp_fusion": True,
    }


def _grid(
    q: Tensor, heads: int, length: int, options: Options, lists: Lists | None, tile: Tile
) -> tuple[int, dict[str, int]]:
    """Programs, and what the kernel takes of how they are laid out."""
    cu_seqlens = options.cu_seqlens_q
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    tiles = triton.cdiv(length, tile.rows) if lists is None else lists.tiles.shape[0]
    layout = {"num_tiles": tiles, "ROWS": tile.rows, "STEP": tile.step, "STAGES": tile.stages}
    return sequences * heads * tiles, layout | {"num_warps": tile.warps}


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See iv2kernels/ops/attention.py; cu_seqlens are not checked, which would wait for the GPU."""
    options = Options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    return forward(q, k, v, options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    lists: Lists | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """attention_fwd, and with lists or the norm of spatiotemporal_attention."""
    q, k, v = _strided(q), _strided(k), _strided(v)
    heads = q.shape[-2]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (*q.shape[:-3], heads, q.shape[-3])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return o, lse
    if k.numel() == 0:
        return o.zero_(), lse.fill_(-torch.inf)
    width, has_norm = (q.shape[-1], q.dtype), norm is not None
    tile = lists.tile if lists else dense_tile("forward", *width, has_norm)
    programs, layout = _grid(q, heads, options.max_seqlen_q, options, lists, tile)
    _attention_fwd_kernel[(programs,)](
        **_arguments(q, k, v, options, lists, norm),
        **layout,
        gain=None if norm is None else norm.gain,
        q_rstd=None if norm is None else norm.rstd[0],
        o=o,
        lse=lse,
        # the maximum is taken before scores are scaled; -inf times 0 would be NaN
        factor=max(abs(options.scale) * _LOG2E, 1e-30),
        NEGATIVE=options.scale < 0,
    )
    return o, lse


def attention_bwd(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = Options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    backward((d_o, dlse), (q, k, v, o, lse), (dq, dk, dv), options)
    return dq, dk, dv


def backward(
    grads: tuple[Tensor, Tensor | None],  # d_o, dlse
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # q, k, v, o, lse
    out: tuple[Tensor, Tensor, Tensor],  # dq, dk, dv
    options: Options,
    lists: tuple[Lists, Lists] | None = None,  # of queries and of keys
    norm: Norm | None = None,
) -> None:
    """Fills dq, dk and dv: rows of tokens, a row contiguous.

    With the norm, dq and dk are the gradients of q * rstd[0] * gain and of k at fixed rstd.
    """
    q, k, v, o, lse = saved
    dq, dk, dv = out
    if q.numel() == 0 or k.numel() == 0:
        for x in out:
            x.zero_()
        return
    q, k, v = _strided(q), _strided(k), _strided(v)
    d_o, dlse = grads[0].contiguous(), contiguous(grads[1])
    width, has_norm = (q.shape[-1], q.dtype), norm is not None
    of_queries, of_keys = (None, None) if lists is None else lists
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    share = torch.empty_like(lse) if q.dtype == torch.float32 else None
    normed = None if norm is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = {"scale": options.scale, "factor": options.scale * _LOG2E}
    tile = of_queries.tile if of_queries else dense_tile("dq", *width, has_norm)
    programs, layout = _grid(q, q.shape[-2], options.max_seqlen_q, options, of_queries, tile)
    attention_dq_kernel[(programs,)](
        **_arguments(q, k, v, options, of_queries, norm),
        **layout,
        **scale,
        gain=None if norm is None else norm.gain,
        q_rstd=None if norm is None else norm.rstd[0],
        o=o,
        d_o=d_o,
        lse=lse,
        dlse=dlse,
        lse2=lse2,
        delta=delta,
        share=share,
        normed=normed,
        dq=dq,
        DQ_TOKEN=dq.stride(-3),
    )
    tile = of_keys.tile if of_keys else dense_tile("dkdv", *width, has_norm)
    programs, layout = _grid(q, k.shape[-2], options.max_seqlen_k, options, of_keys, tile)
    attention_dkdv_kernel[(programs,)](
        **_arguments(q if normed is None else normed, k, v, options, of_keys, norm),
        **layout,
        **scale,
        d_o=d_o,
        lse2=lse2,
        delta=delta,
        share=share,
        dk=dk,
        dv=dv,
        DKV_TOKEN=dv.stride(-3),
    )
