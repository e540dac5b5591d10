"""The two kernels of attention's backward; see attention.py."""

from __future__ import annotations

import triton
import triton.language as tl

from iv2kernels.triton.attention_tiles import (
    add_product,
    head_of,
    load_rows,
    normed_rows,
    num_pieces,
    run_of,
    scale_rows,
    scores,
    sequence_of,
    store_rows,
    tile_of,
    zero_rows,
)

SIZES = ["q_len", "k_len", "lse_stride", "num_tiles"]
SIZES += [f"{name}_stride_{axis}" for name in "qkv" for axis in "bh"]


@triton.jit
def _delta(grads, o, dlse, first, end, ROWS: tl.constexpr, TOKEN: tl.constexpr, D: tl.constexpr):
    """What the softmax's gradient subtracts, of each query."""
    row = tl.arange(0, ROWS)
    outputs = load_rows(o, first, end, ROWS, TOKEN, D, True)
    delta = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(num_pieces(D)):
        delta += tl.sum(outputs[i].to(tl.float32) * grads[i].to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + first + row, mask=row < end - first, other=0.0)
    return delta


@triton.jit(do_not_specialize=SIZES)
def attention_dq_kernel(
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
    d_o,
    lse,
    dlse,
    lse2,
    delta,
    share,
    normed,
    dq,
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
    scale,
    factor,
    Q_TOKEN: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    DQ_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    LISTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The gradient of a tile of queries; lse2, delta, share and normed for the second kernel.

    share, of float32 alone: what a query's weights must be multiplied by to sum to one. At scores
    of hundreds the rounding of lse is that of a weight's fifth digit.
    """
    head = tl.program_id(0) // num_tiles % HEADS
    sequence = tl.program_id(0) // num_tiles // HEADS
    group = head // GROUP
    q = head_of(q, cu_seqlens_q, sequence, head, q_stride_b, q_stride_h, Q_TOKEN, UNIT, PACKED)
    k = head_of(k, cu_seqlens_k, sequence, group, k_stride_b, k_stride_h, K_TOKEN, UNIT, PACKED)
    v = head_of(v, cu_seqlens_k, sequence, group, v_stride_b, v_stride_h, V_TOKEN, UNIT, PACKED)
    q_first, q_len = sequence_of(cu_seqlens_q, sequence, q_len, PACKED)
    k_first, k_len = sequence_of(cu_seqlens_k, sequence, k_len, PACKED)
    first, end, run, last_run = tile_of(tiles, tl.program_id(0) % num_tiles, q_len, ROWS, LISTS)
    row = tl.arange(0, ROWS)
    last = first + row + k_len - q_len
    if PACKED:
        k_len = tl.where(first < q_len, k_len, 0)
        statistic = head.to(tl.int64) * lse_stride + q_first
    else:
        statistic = (sequence * HEADS + head).to(tl.int64) * lse_stride
    token = q_first.to(tl.int64)
    queries = load_rows(q, first, end, ROWS, Q_TOKEN, D, True)
    if NORM:
        queries = normed_rows(queries, q_rstd + token, gain + head * D, first, end, ROWS, D)
        store_rows(normed + (token * HEADS + head) * D, queries, first, end, ROWS, HEADS * D, D)
        k_rstd += k_first
    at = (token * HEADS + head) * D
    grads = load_rows(d_o + at, first, end, ROWS, HEADS * D, D, True)
    if dlse is not None:
        dlse += statistic
    mean = _delta(grads, o + at, dlse, first, end, ROWS, HEADS * D, D)
    # a query that saw no key, or is none, gets weights of 0
    natural = tl.load(lse + statistic + first + row, mask=row < end - first, other=float("-inf"))
    base2 = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
    tl.store(lse2 + statistic + first + row, base2, mask=row < end - first)
    tl.store(delta + statistic + first + row, mean, mask=row < end - first)
    sums = zero_rows(ROWS, D)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(run, last_run):
        begin, stop = run_of(runs, i, k_len, LISTS)
        if CAUSAL:
            stop = tl.minimum(k_len, first + k_len - q_len + ROWS)
        for n in tl.range(begin, stop, STEP, num_stages=STAGES):
            key = n + tl.arange(0, STEP)
            keys = load_rows(k, n, stop, STEP, K_TOKEN, D, True)
            s = scores(queries, keys)
            if NORM:
                by = tl.load(k_rstd + key, mask=key < stop, other=0.0)
                s *= by[None, :]
            seen = (key < stop)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= last[:, None])
            p = tl.where(seen, tl.exp2(tl.fma(s, factor, -base2[:, None])), 0.0)
            dp = scores(grads, load_rows(v, n, stop, STEP, V_TOKEN, D, True))
            if share is not None:
                total += tl.sum(p, 1)
            ds = p * (dp - mean[:, None])
            if NORM:
                ds *= by[None, :]
            sums = add_product(sums, ds, keys)
    by_row = tl.full([ROWS], 1.0, tl.float32)
    if share is not None:
        by_row = 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(share + statistic + first + row, by_row, mask=row < end - first)
    sums = scale_rows(sums, by_row * scale)
    store_rows(dq + token * DQ_TOKEN + head * D, sums, first, end, ROWS, DQ_TOKEN, D)


@triton.jit(do_not_specialize=SIZES)
def attention_dkdv_kernel(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    tiles,
    runs,
    k_rstd,
    d_o,
    lse2,
    delta,
    share,
    dk,
    dv,
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
    scale,
    factor,
    Q_TOKEN: tl.constexpr,
    K_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr,
    DKV_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    LISTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """The gradients of a tile of keys and values."""
    group = tl.program_id(0) // num_tiles % (HEADS // GROUP)
    sequence = tl.program_id(0) // num_tiles // (HEADS // GROUP)
    k = head_of(k, cu_seqlens_k, sequence, group, k_stride_b, k_stride_h, K_TOKEN, UNIT, PACKED)
    v = head_of(v, cu_seqlens_k, sequence, group, v_stride_b, v_stride_h, V_TOKEN, UNIT, PACKED)
    q_first, q_len = sequence_of(cu_seqlens_q, sequence, q_len, PACKED)
    k_first, k_len = sequence_of(cu_seqlens_k, sequence, k_len, PACKED)
    first, end, run, last_run = tile_of(tiles, tl.program_id(0) % num_tiles, k_len, ROWS, LISTS)
    if PACKED:
        q_len = tl.where(first < k_len, q_len, 0)
    row = tl.arange(0, ROWS)
    keys = load_rows(k, first, end, ROWS, K_TOKEN, D, True)
    values = load_rows(v, first, end, ROWS, V_TOKEN, D, True)
    by = tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        by = tl.load(k_rstd + k_first + first + row, mask=row < end - first, other=0.0)
    exponent = by * factor
    key_sums = zero_rows(ROWS, D)
    value_sums = zero_rows(ROWS, D)
    for member in range(GROUP):
        head = group * GROUP + member
        rows = head_of(
            q, cu_seqlens_q, sequence, head, q_stride_b, q_stride_h, Q_TOKEN, UNIT, PACKED
        )
        grad_rows = d_o + (q_first.to(tl.int64) * HEADS + head) * D
        if PACKED:
            statistic = head.to(tl.int64) * lse_stride + q_first
        else:
            statistic = (sequence * HEADS + head).to(tl.int64) * lse_stride
        for i in range(run, last_run):
            begin, stop = run_of(runs, i, q_len, LISTS)
            if CAUSAL:
                begin = tl.maximum(first + q_len - k_len, 0)
            for m in tl.range(begin, stop, STEP, num_stages=STAGES):
                query = m + tl.arange(0, STEP)
                queries = load_rows(rows, m, stop, STEP, Q_TOKEN, D, True)
                base2 = tl.load(lse2 + statistic + query, mask=query < stop, other=float("inf"))
                s = scores(keys, queries)
                p = tl.exp2(tl.fma(s, exponent[:, None], -base2[None, :]))
                if CAUSAL:
                    seen = (first + row)[:, None] <= (query + k_len - q_len)[None, :]
                    p = tl.where(seen, p, 0.0)
                if share is not None:
                    one = tl.load(share + statistic + query, mask=query < stop, other=0.0)
                    p *= one[None, :]
                grads = load_rows(grad_rows, m, stop, STEP, HEADS * D, D, True)
                value_sums = add_product(value_sums, p, grads)
                mean = tl.load(delta + statistic + query, mask=query < stop, other=0.0)
                ds = p * (scores(values, grads) - mean[None, :])
                key_sums = add_product(key_sums, ds, queries)
    at = k_first.to(tl.int64) * DKV_TOKEN + group * D
    store_rows(dk + at, scale_rows(key_sums, by * scale), first, end, ROWS, DKV_TOKEN, D)
    store_rows(dv + at, value_sums, first, end, ROWS, DKV_TOKEN, D)
