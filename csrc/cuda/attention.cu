// attention.cu - o = softmax(scale q k^T) v, and the log-sum-exp of each row.
//
// A block has 128 queries of a head (64 at head_dim 128), a quarter each warp, and goes over the
// keys in tiles with the softmax of FlashAttention-2: a running maximum and sum of each row, the
// output scaled when the maximum grows. Tiles of k and v are double-buffered by cp.async: a tile is
// copied while the one before it is used, and one barrier a tile is enough. The keys are the serial
// axis. Products are mma.m16n8k16, and a warp skips tiles that none of its rows sees. Bound by the
// tensor cores.
//
// Dao, FlashAttention-2, 2023, arXiv:2307.08691.
#include "attention_tiles.cuh"

namespace iv2::cuda {
namespace {

constexpr int kKeys = 64;  // of a tile
template <int D>
constexpr size_t kSharedElements = D * (kQueries<D> + 4 * kKeys);

// s becomes 2^(s - top); top and total are of its rows, and o is scaled to the new top.
template <int D, int N>
__device__ __forceinline__ void soften(float (&s)[N][4], float (&top)[2], float (&total)[2],
                                       float (&o)[D / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float best = top[half];
#pragma unroll
    for (int n = 0; n < N; ++n) best = fmaxf(best, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    best = quad_max(best);
    const float base = best == -INFINITY ? 0.0f : best;  // no key was visible yet
    const float shrink = exp2_fast(top[half] - base);
    top[half] = best;
    total[half] *= shrink;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      o[d][half * 2] *= shrink;
      o[d][half * 2 + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = half * 2; j < half * 2 + 2; ++j) {
        s[n][j] = exp2_fast(s[n][j] - base);
        total[half] += s[n][j];
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    fwd_kernel(const AttentionFwd a, int blocks, float scale) {
  constexpr int columns = kKeys / 8;
  constexpr int row_tiles = kRowTiles<D>, queries = kQueries<D>;
  IV2_SHARED_DYNAMIC(T, q_tile);
  T* kv_tiles = q_tile + queries * D;  // [2][k, v][kKeys][D]
  const QueryBlock own = query_block<D>(a, blocks);
  if (own.count <= 0) return;
  const Sequence& seq = own.seq;
  const int head = own.head, kv_head = own.kv_head, q0 = own.first, count = own.count;
  const T* q = static_cast<const T*>(a.q) + seq.batch * a.q_batch + head * a.q_head;
  const T* k = static_cast<const T*>(a.k) + seq.batch * a.k_batch + kv_head * a.k_head;
  const T* v = static_cast<const T*>(a.v) + seq.batch * a.v_batch + kv_head * a.v_head;
  const auto copy_keys = [&](int tile) {
    const int first = tile * kKeys;
    T* to = kv_tiles + tile % 2 * (2 * kKeys * D);
    copy_rows<D, kKeys>(to, k + (seq.k_row + first) * a.k_token, a.k_token, seq.k_count - first);
    copy_rows<D, kKeys>(to + kKeys * D, v + (seq.k_row + first) * a.v_token, a.v_token,
                        seq.k_count - first);
  };
  const int tiles = (keys_seen(seq, q0 + count - 1, a.causal) + kKeys - 1) / kKeys;
  copy_rows<D, queries>(q_tile, q + (seq.q_row + q0) * a.q_token, a.q_token, count);
  if (tiles > 0) copy_keys(0);
  copy_async_commit();

  const int lane = lane_id(), row0 = warp_id() * 16 * row_tiles;
  const Seen seen = keys_seen_by_warp<D>(own, row0, a.causal);
  float o[row_tiles][D / 8][4] = {}, top[row_tiles][2], total[row_tiles][2] = {};
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) top[m][0] = top[m][1] = -INFINITY;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    sync_block();  // the tile is there, and the one before it is done with
    if (tile + 1 < tiles) copy_keys(tile + 1);
    copy_async_commit();
    const int first = tile * kKeys;
    if (first >= seen.by_any) continue;
    const T* k_tile = kv_tiles + tile % 2 * (2 * kKeys * D);
    float s[row_tiles][columns][4] = {};
    add_scores<T, D>(s, q_tile, row0, k_tile, 0);
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < columns; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[m][n][j] *= scale;
      }
    }
    if (first + kKeys > seen.by_all) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = q0 + row0 + m * 16 + half * 8 + lane / 4;
          const int keys = keys_seen(seq, row, a.causal) - first - lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < columns; ++n) {
            if (n * 8 >= keys) s[m][n][half * 2] = -INFINITY;
            if (n * 8 + 1 >= keys) s[m][n][half * 2 + 1] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) soften<D>(s[m], top[m], total[m], o[m]);
    add_weighted<T, D>(o, s, k_tile + kKeys * D);
  }
  copy_async_wait<0>();
  sync_block();  // where there was no key, q's copies by other threads must land before o

#pragma unroll
  for (int m = 0; m < row_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + m * 16 + half * 8 + lane / 4;
      const float sum = quad_sum(total[m][half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane % 4 == 0 && row < count) {
        const float lse = sum == 0.0f ? -INFINITY : (top[m][half] + log2f(sum)) * kLn2;
        write(a.lse + lse_at(a, seq, head) + q0 + row, lse);
      }
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        o[m][d][half * 2] *= inverse;
        o[m][d][half * 2 + 1] *= inverse;
      }
    }
  }
  const int64_t stride = a.heads * D;
  T* out = static_cast<T*>(a.o) + (seq.q_token + q0) * stride + head * D;
  store_rows<T, D>(q_tile, row0, o, out, stride, count);
}

}  // namespace

int attention_fwd(const AttentionFwd& a, Stream stream) {
  return by_head_dim(a.dtype, a.head_dim, [&](auto type, auto dim) {
    using T = decltype(type);
    const int blocks = static_cast<int>((a.q_len - 1) / kQueries<dim.value> + 1);
    const dim3 grid(static_cast<unsigned>(a.batch * a.heads * blocks));
    return launch(fwd_kernel<T, dim.value>, grid, dim3(kAttentionThreads),
                  kSharedElements<dim.value> * sizeof(T), stream, a, blocks,
                  static_cast<float>(a.scale) * kLog2E);
  });
}

}  // namespace iv2::cuda
