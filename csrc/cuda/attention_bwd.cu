// attention_bwd.cu - the gradients of attention, with the scores computed again from q, k and lse.
//
// Two launches like forward's, and no sum over blocks: in the first a block has queries of a head
// and goes over the keys for dq; in the second it has keys of a kv head and goes over the queries
// of all heads that share it for dk and dv. Both compute p = 2^(s - lse) and ds = p (dp - delta) in
// registers, in the layout that the next product takes; the second computes them transposed. The
// first leaves delta = sum(do o) - dlse of each query in scratch for the second. Seven products in
// place of five are the price of sums in a fixed order. Tiles are double-buffered by cp.async.
// Bound by the tensor cores and by what they read of shared memory.
#include "attention_tiles.cuh"

namespace iv2::cuda {
namespace {

constexpr int kSteps = 32;  // rows of the tiles that a block goes over
constexpr int kColumns = kSteps / 8;
constexpr int kKeys = 16 * kAttentionWarps;  // for two tiles a warp, their sums are too many

// A block's own rows, of two tensors, and double-buffered steps of two others.
template <int D, int rows>
constexpr size_t kSharedElements = D * (2 * rows + 4 * kSteps);

// Products of two rows, summed, for rows lane / 4 and 8 below it. ldmatrix reads without conflicts.
template <class T, int D>
__device__ __forceinline__ void dot_rows(float (&sum)[2], const T* a, const T* b, int row0) {
  const int lane = lane_id();
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int pair = 0; pair < D / 8; pair += 2) {
    const bool is_half = pair + 1 == D / 8;
    const int at = chunk_at<D>(row0 + lane % 16, pair, is_half ? 0 : lane / 16);
    uint32_t left[4], right[4];
    ldmatrix(left, a + at);
    ldmatrix(right, b + at);
#pragma unroll
    for (int i = 0; i < (is_half ? 2 : 4); ++i) {
      const auto part = [](uint32_t bits) { return to_float(T{static_cast<uint16_t>(bits)}); };
      sum[i % 2] += part(left[i]) * part(right[i]);
      sum[i % 2] += part(left[i] >> 16) * part(right[i] >> 16);
    }
  }
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
}

template <int M, int N>
__device__ __forceinline__ void scale_rows(float (&x)[M][N][4], float scale) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[m][n][j] *= scale;
    }
  }
}

// delta and lse in base 2 of the warp's rows; delta is left in scratch too.
template <class T, int D, int M>
__device__ __forceinline__ void row_stats(const AttentionBwd& a, int64_t at, const T* d_o,
                                          const T* o, int row0, int count, float (&delta)[M][2],
                                          float (&lse)[M][2]) {
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    dot_rows<T, D>(delta[m], d_o, o, row0 + m * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + lane / 4;
      lse[m][half] = row < count ? read(a.lse + at + row) * kLog2E : 0.0f;
      if (row >= count) continue;
      if (a.dlse) delta[m][half] -= read(a.dlse + at + row);
      if (lane % 4 == 0) write(a.scratch + at + row, delta[m][half]);
    }
  }
}

// s, which is q k^T on entry, becomes ds, with do v^T in dp: a warp's queries by kSteps keys; `row`
// and `first` are the first of each.
template <int M>
__device__ __forceinline__ void weigh_rows(float (&s)[M][kColumns][4],
                                           const float (&dp)[M][kColumns][4],
                                           const float (&lse)[M][2], const float (&delta)[M][2],
                                           float scale, const Sequence& seq, bool causal, int row,
                                           int first, bool all_see) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < M * 4; ++i) {
    const int m = i / 4, j = i % 4, half = j / 2;
    const int query = row + m * 16 + half * 8 + lane / 4;
    const int seen = keys_seen(seq, query, causal) - first - lane % 4 * 2 - j % 2;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float p = exp2_fast(s[m][n][j] * scale - lse[m][half]);
      s[m][n][j] = all_see || n * 8 < seen ? p * (dp[m][n][j] - delta[m][half]) : 0.0f;
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    dq_kernel(const AttentionBwd a, int blocks, float scale) {
  constexpr int row_tiles = kRowTiles<D>, queries = kQueries<D>;
  IV2_SHARED_DYNAMIC(T, q_tile);
  T* do_tile = q_tile + queries * D;
  T* kv_tiles = do_tile + queries * D;  // [2][k, v][kSteps][D], and o before them
  static_assert(queries <= 4 * kSteps);
  const QueryBlock own = query_block<D>(a, blocks);
  if (own.count <= 0) return;
  const Sequence& seq = own.seq;
  const int head = own.head, kv_head = own.kv_head, q0 = own.first, count = own.count;
  const T* q = static_cast<const T*>(a.q) + seq.batch * a.q_batch + head * a.q_head;
  const T* k = static_cast<const T*>(a.k) + seq.batch * a.k_batch + kv_head * a.k_head;
  const T* v = static_cast<const T*>(a.v) + seq.batch * a.v_batch + kv_head * a.v_head;
  const int64_t stride = a.heads * D, at = (seq.q_token + q0) * stride + head * D;
  const auto copy_keys = [&](int tile) {
    const int first = tile * kSteps;
    T* to = kv_tiles + tile % 2 * (2 * kSteps * D);
    copy_rows<D, kSteps>(to, k + (seq.k_row + first) * a.k_token, a.k_token, seq.k_count - first);
    copy_rows<D, kSteps>(to + kSteps * D, v + (seq.k_row + first) * a.v_token, a.v_token,
                         seq.k_count - first);
  };
  const int tiles = (keys_seen(seq, q0 + count - 1, a.causal) + kSteps - 1) / kSteps;
  copy_rows<D, queries>(do_tile, static_cast<const T*>(a.d_o) + at, stride, count);
  copy_rows<D, queries>(kv_tiles, static_cast<const T*>(a.o) + at, stride, count);
  copy_async_commit();
  copy_rows<D, queries>(q_tile, q + (seq.q_row + q0) * a.q_token, a.q_token, count);
  copy_async_commit();

  const int row0 = warp_id() * 16 * row_tiles;
  const Seen seen = keys_seen_by_warp<D>(own, row0, a.causal);
  float delta[row_tiles][2], lse[row_tiles][2], dq[row_tiles][D / 8][4] = {};
  copy_async_wait<1>();
  sync_block();
  row_stats<T, D>(a, lse_at(a, seq, head) + q0, do_tile, kv_tiles, row0, count, delta, lse);
  sync_block();  // o is done with
  if (tiles > 0) copy_keys(0);
  copy_async_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    sync_block();  // the tile is there, and the one before it is done with
    if (tile + 1 < tiles) copy_keys(tile + 1);
    copy_async_commit();
    const int first = tile * kSteps;
    if (first >= seen.by_any) continue;
    const T* k_tile = kv_tiles + tile % 2 * (2 * kSteps * D);
    float s[row_tiles][kColumns][4] = {}, dp[row_tiles][kColumns][4] = {};
    add_scores<T, D>(s, q_tile, row0, k_tile, 0);
    add_scores<T, D>(dp, do_tile, row0, k_tile + kSteps * D, 0);
    weigh_rows(s, dp, lse, delta, scale, seq, a.causal, q0 + row0, first,
               first + kSteps <= seen.by_all);
    add_weighted<T, D>(dq, s, k_tile);
  }
  copy_async_wait<0>();
  sync_block();  // where there was no key, q's copies by other threads must land before dq
  scale_rows(dq, static_cast<float>(a.scale));
  T* out = static_cast<T*>(a.dq) + (seq.q_token + q0) * a.dq_token + head * D;
  store_rows<T, D>(q_tile, row0, dq, out, a.dq_token, count);
}

// p and ds of k q^T and v do^T, which they are on entry: a warp's keys by kSteps queries, the first
// of which are `key` and `first`; query i sees keys up to i + ahead. Of stats, lse and delta.
__device__ __forceinline__ void weigh_columns(float (&p)[1][kColumns][4],
                                              float (&ds)[1][kColumns][4],
                                              const float (&stats)[2][kSteps], float scale,
                                              bool all_see, int key, int first, int ahead) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int column = n * 8 + lane % 4 * 2 + odd;
      const float lse = stats[0][column], delta = stats[1][column];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &x = p[0][n][half * 2 + odd], &y = ds[0][n][half * 2 + odd];
        const bool visible = all_see || key + half * 8 + lane / 4 <= first + column + ahead;
        x = visible ? exp2_fast(x * scale - lse) : 0.0f;
        y = x * (y - delta);
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    dkv_kernel(const AttentionBwd a, int blocks, float scale) {
  IV2_SHARED(float, stats, [2][2][kSteps]);  // of queries: lse, delta
  IV2_SHARED_DYNAMIC(T, k_tile);
  T* v_tile = k_tile + kKeys * D;
  T* q_tiles = v_tile + kKeys * D;  // [2][q, do][kSteps][D]
  const int index = static_cast<int>(blockIdx.x) / blocks;
  const int k0 = static_cast<int>(blockIdx.x) % blocks * kKeys;
  const int kv_heads = static_cast<int>(a.kv_heads), kv_head = index % kv_heads;
  const int group = static_cast<int>(a.heads / a.kv_heads);
  const Sequence seq = sequence_of(a, index / kv_heads);
  if (k0 >= seq.k_count) return;
  const int count = seq.k_count - k0 < kKeys ? seq.k_count - k0 : kKeys;
  const T* k = static_cast<const T*>(a.k) + seq.batch * a.k_batch + kv_head * a.k_head;
  const T* v = static_cast<const T*>(a.v) + seq.batch * a.v_batch + kv_head * a.v_head;
  // Under causal, query i sees keys up to i + ahead, and the first queries may see none of these.
  const int ahead = seq.k_count - seq.q_count;
  const int first_tile = a.causal && k0 > ahead ? (k0 - ahead) / kSteps : 0;
  const int each = (seq.q_count + kSteps - 1) / kSteps - first_tile, tiles = each * group;
  const auto copy_queries = [&](int tile) {
    const int head = kv_head * group + tile / each, first = (first_tile + tile % each) * kSteps;
    const T* q = static_cast<const T*>(a.q) + seq.batch * a.q_batch + head * a.q_head;
    const int64_t stride = a.heads * D, at = (seq.q_token + first) * stride + head * D;
    T* to = q_tiles + tile % 2 * (2 * kSteps * D);
    copy_rows<D, kSteps>(to, q + (seq.q_row + first) * a.q_token, a.q_token, seq.q_count - first);
    copy_rows<D, kSteps>(to + kSteps * D, static_cast<const T*>(a.d_o) + at, stride,
                         seq.q_count - first);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kSteps) return;
    const int64_t from = lse_at(a, seq, head) + first + i;
    const float lse = first + i < seq.q_count ? read(a.lse + from) : INFINITY;
    // a query that sees nothing, or is none, gives every key the weight 0
    stats[tile % 2][0][i] = lse == -INFINITY ? INFINITY : lse * kLog2E;
    stats[tile % 2][1][i] = first + i < seq.q_count ? read(a.scratch + from) : 0.0f;
  };
  copy_rows<D, kKeys>(k_tile, k + (seq.k_row + k0) * a.k_token, a.k_token, count);
  copy_rows<D, kKeys>(v_tile, v + (seq.k_row + k0) * a.v_token, a.v_token, count);
  if (tiles > 0) copy_queries(0);
  copy_async_commit();

  const int row0 = warp_id() * 16, key = k0 + row0;
  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    sync_block();
    if (tile + 1 < tiles) copy_queries(tile + 1);
    copy_async_commit();
    const T* q_tile = q_tiles + tile % 2 * (2 * kSteps * D);
    const T* do_tile = q_tile + kSteps * D;
    const int first = (first_tile + tile % each) * kSteps;
    if (row0 >= count || (a.causal && first + kSteps - 1 + ahead < key)) continue;
    const bool all_see = !a.causal || first + ahead >= key + 15;
    float p[1][kColumns][4] = {}, ds[1][kColumns][4] = {};
    add_scores<T, D>(p, k_tile, row0, q_tile, 0);
    add_scores<T, D>(ds, v_tile, row0, do_tile, 0);
    weigh_columns(p, ds, stats[tile % 2], scale, all_see, key, first, ahead);
    add_weighted<T, D>(dv, p, do_tile);
    add_weighted<T, D>(dk, ds, q_tile);
  }
  copy_async_wait<0>();
  sync_block();  // where there was no query, k's copies by other threads must land before dk
  scale_rows(dk, static_cast<float>(a.scale));
  const int64_t token = a.cu_seqlens_q ? seq.k_row : seq.batch * a.k_len;
  const int64_t at = (token + k0) * a.dkv_token + kv_head * D;
  store_rows<T, D>(k_tile, row0, dk, static_cast<T*>(a.dk) + at, a.dkv_token, count);
  store_rows<T, D>(v_tile, row0, dv, static_cast<T*>(a.dv) + at, a.dkv_token, count);
}

}  // namespace

int attention_bwd(const AttentionBwd& a, Stream stream) {
  return by_head_dim(a.dtype, a.head_dim, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int D = dim.value;
    constexpr size_t q_shared = kSharedElements<D, kQueries<D>> * sizeof(T);
    constexpr size_t k_shared = kSharedElements<D, kKeys> * sizeof(T);
    const float scale = static_cast<float>(a.scale) * kLog2E;
    const int q_blocks = static_cast<int>((a.q_len - 1) / kQueries<D> + 1);
    const int k_blocks = static_cast<int>((a.k_len - 1) / kKeys + 1);
    const dim3 block(kAttentionThreads);
    const dim3 q_grid(static_cast<unsigned>(a.batch * a.heads * q_blocks));
    const dim3 k_grid(static_cast<unsigned>(a.batch * a.kv_heads * k_blocks));
    const int error = launch(dq_kernel<T, D>, q_grid, block, q_shared, stream, a, q_blocks, scale);
    if (error != 0) return error;
    return launch(dkv_kernel<T, D>, k_grid, block, k_shared, stream, a, k_blocks, scale);
  });
}

}  // namespace iv2::cuda
