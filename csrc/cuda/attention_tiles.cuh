// attention_tiles.cuh - what the passes of attention share: tiles of rows of head_dim in shared
// memory, their products on the tensor cores, and which rows and keys a block has.
//
// A tile is kRows rows of D elements, in chunks of 16 bytes and without padding: where a row has an
// odd number of chunks (D = 88) eight rows lie in eight groups of banks as they are, else the chunk
// is permuted by the row. A product of two tiles keeps its result in registers, in the layout of
// mma's d, which for a 16-bit copy is that of its a: scores become weights of the next product with
// no trip through memory. A warp has M x 16 rows of the result. Of D = 88 the last step of 16 is
// half masked, and columns are 11 tiles of 8: nothing is padded to 128.
#pragma once
#include "pack.cuh"

namespace iv2::cuda {
namespace {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// Where chunk pair + bit of a row begins, in elements; pair is even. A constant pair is a constant
// distance from one of four places at most, which is what the addresses of a product cost.
template <int D>
__device__ __forceinline__ int chunk_at(int row, int pair, int bit) {
  constexpr int chunks = D / 8;
  static_assert(D % 8 == 0 && (chunks % 2 == 1 || chunks % 8 == 0));
  if constexpr (chunks % 2 == 1) return (row * chunks + pair + bit) * 8;
  return (row * chunks + (pair & ~7) + ((pair & 7) ^ (bit ^ (row & 7)))) * 8;
}

// The first `count` rows, `stride` elements apart, and zeros for the rest of the tile.
template <int D, int kRows, class T>
__device__ __forceinline__ void copy_rows(T* tile, const T* rows, int64_t stride, int count) {
  constexpr int chunks = D / 8;
  // unrolled, its addresses would take the registers of scores
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * chunks; i += kAttentionThreads) {
    const int row = i / chunks, c = i % chunks;
    const bool valid = row < count;
    copy_async(tile + chunk_at<D>(row, c & ~1, c & 1), rows + (valid ? row * stride + c * 8 : 0),
               valid);
  }
}

// s += a b^T: of M * 16 rows of tile `a` from a_row on, and N * 8 rows of tile `b` from b_row on.
template <class T, int D, int M, int N>
__device__ __forceinline__ void add_scores(float (&s)[M][N][4], const T* a, int a_row, const T* b,
                                           int b_row) {
  static_assert(N % 4 == 0);
  const int lane = lane_id();
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ldmatrix(left[m], a + chunk_at<D>(a_row + m * 16 + lane % 16, step * 2, lane / 16));
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      const int row = b_row + n * 8 + lane % 8 + lane / 16 * 8;
      ldmatrix(right, b + chunk_at<D>(row, step * 2, lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(s[m][n], left[m], {right[0], right[1]});
        mma<T>(s[m][n + 1], left[m], {right[2], right[3]});
      }
    }
  }
  if constexpr (D % 16 != 0) {  // half a step: the other half of both is zero
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      ldmatrix(left[m], a + chunk_at<D>(a_row + m * 16 + lane % 16, D / 8 - 1, 0));
      left[m][2] = left[m][3] = 0;
    }
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      uint32_t right[4];
      ldmatrix(right, b + chunk_at<D>(b_row + n * 8 + lane, D / 8 - 1, 0));
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mma<T>(s[m][n + i], left[m], {right[i], 0});
      }
    }
  }
}

// out += p b: weights p of N * 8 rows of tile `b` from its first on, rounded to T.
template <class T, int D, int M, int N>
__device__ __forceinline__ void add_weighted(float (&out)[M][D / 8][4], const float (&p)[M][N][4],
                                             const T* b) {
  static_assert(N % 4 == 0);
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < N; n += 4) {  // two steps of 16
    uint32_t left[M][2][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float (&pair)[4] = p[m][n + i / 2];
        left[m][i / 4][i % 4] = pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int d = 0; d + 1 < D / 8; d += 2) {
        uint32_t right[4];
        const int row = n * 8 + step * 16 + lane % 16;
        ldmatrix_transposed(right, b + chunk_at<D>(row, d, lane / 16));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          mma<T>(out[m][d], left[m][step], {right[0], right[1]});
          mma<T>(out[m][d + 1], left[m][step], {right[2], right[3]});
        }
      }
    }
    if constexpr (D / 8 % 2 != 0) {  // the last columns, of both steps at once
      uint32_t right[4];
      ldmatrix_transposed(right, b + chunk_at<D>(n * 8 + lane, D / 8 - 1, 0));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(out[m][D / 8 - 1], left[m][0], {right[0], right[1]});
        mma<T>(out[m][D / 8 - 1], left[m][1], {right[2], right[3]});
      }
    }
  }
}

// A warp's rows of a result to memory, by way of the same rows of a tile that it alone uses.
template <class T, int D, int M>
__device__ __forceinline__ void store_rows(T* tile, int row, const float (&x)[M][D / 8][4], T* out,
                                           int64_t stride, int count) {
  const int lane = lane_id();
  sync_warp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* p = tile + chunk_at<D>(row + m * 16 + half * 8 + lane / 4, d & ~1, d & 1) + lane % 4 * 2;
        write_shared(reinterpret_cast<Word4*>(p),
                     Word4{pack_pair<T>(x[m][d][half * 2], x[m][d][half * 2 + 1])});
      }
    }
  }
  sync_warp();
  for (int i = lane; i < M * 16 * (D / 8); i += 32) {
    const int r = i / (D / 8), c = i % (D / 8);
    if (row + r >= count) break;
    write(reinterpret_cast<Word16*>(out + (row + r) * stride + c * 8),
          read_shared(reinterpret_cast<const Word16*>(tile + chunk_at<D>(row + r, c & ~1, c & 1))));
  }
}

// Of the four lanes that share a row of a result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// A sequence: its lengths, and its first tokens' numbers among the rows of a sample, and of q over
// the whole batch. Offsets in elements are made where they are used: they would take registers.
struct Sequence {
  int batch, q_count, k_count, q_row, k_row, q_token;
};
template <class Args>
__device__ __forceinline__ Sequence sequence_of(const Args& a, int batch) {
  const int q_len = static_cast<int>(a.q_len), k_len = static_cast<int>(a.k_len);
  if (!a.cu_seqlens_q) return {batch, q_len, k_len, 0, 0, batch * q_len};
  const int q = read_cached(a.cu_seqlens_q + batch), k = read_cached(a.cu_seqlens_k + batch);
  return {batch,
          read_cached(a.cu_seqlens_q + batch + 1) - q,
          read_cached(a.cu_seqlens_k + batch + 1) - k,
          q,
          k,
          q};
}
// Offset of the first query of a head in lse.
template <class Args>
__device__ __forceinline__ int64_t lse_at(const Args& a, const Sequence& s, int head) {
  return a.cu_seqlens_q ? head * a.total_q + s.q_token : (s.batch * a.heads + head) * a.q_len;
}

// Keys that query i sees: the first so many.
__device__ __forceinline__ int keys_seen(const Sequence& s, int i, bool causal) {
  if (!causal) return s.k_count;
  const int seen = i + 1 + s.k_count - s.q_count;
  return seen < 0 ? 0 : seen < s.k_count ? seen : s.k_count;
}

// Tiles of 16 queries that a warp has: two share what it reads of k and v, where registers suffice.
template <int D>
constexpr int kRowTiles = D == 128 ? 1 : 2;
template <int D>
constexpr int kQueries = 16 * kRowTiles<D> * kAttentionWarps;

// The queries of a head that a block has, kQueries at most; count is not positive where there are
// none.
struct QueryBlock {
  Sequence seq;
  int head, kv_head, first, count;
};
template <int D, class Args>
__device__ __forceinline__ QueryBlock query_block(const Args& a, int blocks) {
  const int index = static_cast<int>(blockIdx.x) / blocks;
  const int block = static_cast<int>(blockIdx.x) % blocks;
  // Under causal the last queries have most to do: they start first.
  const int first = (a.causal ? blocks - 1 - block : block) * kQueries<D>;
  const int heads = static_cast<int>(a.heads), head = index % heads;
  const int kv_head = head / static_cast<int>(a.heads / a.kv_heads);
  const Sequence seq = sequence_of(a, index / heads);
  const int rest = seq.q_count - first;
  return {seq, head, kv_head, first, rest < kQueries<D> ? rest : kQueries<D>};
}

// How many keys all, and any, of a warp's rows of a block see: what its first row sees, all do;
// what its last does not, none does.
struct Seen {
  int by_all, by_any;
};
template <int D>
__device__ __forceinline__ Seen keys_seen_by_warp(const QueryBlock& b, int row0, bool causal) {
  if (row0 >= b.count) return {0, 0};
  const int end = row0 + 16 * kRowTiles<D>;
  const int last = (end < b.count ? end : b.count) - 1;
  return {keys_seen(b.seq, b.first + row0, causal), keys_seen(b.seq, b.first + last, causal)};
}

// f(T{}, Int<D>{}) for a dtype and a head_dim that there are kernels of; else
// cudaErrorInvalidValue.
template <class F>
int by_head_dim(int64_t dtype, int64_t head_dim, F f) {
  const auto of_type = [&](auto type) {
    if (head_dim == 64) return f(type, Int<64>{});
    if (head_dim == 88) return f(type, Int<88>{});
    if (head_dim == 128) return f(type, Int<128>{});
    return 1;
  };
  if (dtype == kBFloat16) return of_type(bf16{});
  if (dtype == kFloat16) return of_type(f16{});
  return 1;
}

}  // namespace
}  // namespace iv2::cuda
