// gather_tokens.cu - rows of x by index, with an optional sum, and the scatter-add that is its
// gradient.
//
// Forward gives a row of y to a block. Backward gives a row of dx, or a slab of its columns, to a
// block, which looks through the indices of the samples that share it, a warp's ballot at a time,
// and adds the rows of dy that belong to it in their order: no atomics, no sorting, no zeroing
// pass, duplicates allowed, the same bits every time. Both are bound by memory: a row is read or
// written once; the indices, which every block of a sample reads, come from L2. An index out of
// range gives a row of NaN, and its gradient is dropped.
#include "pack.cuh"

namespace iv2::cuda {
namespace {

constexpr unsigned kThreads = 256;

struct Slabs {
  unsigned count, threads;
};
Slabs slabs_of(int64_t packs) {
  const int64_t count = (packs + kThreads - 1) / kThreads, each = (packs + count - 1) / count;
  return {static_cast<unsigned>(count), static_cast<unsigned>((each + 31) / 32 * 32)};
}

template <class X, class Y, int N>
__global__ void __launch_bounds__(kThreads) fwd_kernel(const GatherTokensFwd a) {
  const int64_t m = blockIdx.x, id = read_cached(a.ids + m);
  const int64_t i = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  if (i >= a.dim) return;
  Y* y = static_cast<Y*>(a.y) + m * a.dim + i;
  float sum[N];
  if (id < 0 || id >= a.tokens) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = float_from_bits(0x7FFFFFFFu);
    store(y, from_floats<Y>(sum));
    return;
  }
  const Pack<X, N> x =
      load<N>(static_cast<const X*>(a.x) + m / a.keep * a.x_batch + id * a.x_token + i);
  if constexpr (std::is_same_v<X, Y>) {
    if (a.add == nullptr) {
      store(y, x);
      return;
    }
  }
  Pack<Y, N> other;
  if (a.add) other = load<N>(static_cast<const Y*>(a.add) + m * a.dim + i);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    sum[j] = to_float(x.v[j]);
    if (a.add) sum[j] += to_float(other.v[j]);
  }
  store(y, from_floats<Y>(sum));
}

template <class DY, class DX, int N>
__global__ void __launch_bounds__(kThreads) bwd_kernel(const GatherTokensBwd a) {
  // which of a round's indices are this row's; rounds take turns with the two
  IV2_SHARED(unsigned, hits, [2][kThreads / 32]);
  const int64_t sample = blockIdx.x / a.tokens, token = blockIdx.x % a.tokens;
  const int64_t i = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  const int64_t first = sample * a.keep, count = a.x_batch == 1 ? a.batch * a.keep : a.keep;
  const int warps = blockDim.x / 32;
  float total[N] = {};
  int turn = 0;
  for (int64_t begin = 0; begin < count; begin += blockDim.x, turn ^= 1) {
    const int64_t mine = begin + threadIdx.x;
    const unsigned hit = ballot(mine < count && read_cached(a.ids + first + mine) == token);
    if (threadIdx.x % 32 == 0) hits[turn][threadIdx.x / 32] = hit;
    sync_block();
    for (int w = 0; w < warps; ++w) {
      for (unsigned bits = hits[turn][w]; bits != 0; bits &= bits - 1) {
        const int64_t m = first + begin + w * 32 + first_bit(bits);
        if (i >= a.dim) continue;
        const Pack<DY, N> dy = load<N>(static_cast<const DY*>(a.dy) + m / a.keep * a.dy_batch +
                                       m % a.keep * a.dim + i);
#pragma unroll
        for (int j = 0; j < N; ++j) total[j] += to_float(dy.v[j]);
      }
    }
  }
  if (i < a.dim) store(static_cast<DX*>(a.dx) + blockIdx.x * a.dim + i, from_floats<DX>(total));
}

// f(A{}, B{}, N) for the dtypes: packs for equal ones and where one is float32, else elements.
template <class F>
int by_pair(int64_t a_dtype, int64_t b_dtype, bool whole_packs, F f) {
  return by_dtype(a_dtype, [&](auto a) {
    return by_dtype(b_dtype, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      if constexpr (std::is_same_v<A, B> || sizeof(A) == 4 || sizeof(B) == 4) {
        if (whole_packs) return f(a, b, Int<pack_size<A, B>>{});
      }
      return f(a, b, Int<1>{});
    });
  });
}

// Whether strides and sizes in elements are multiples of any pack.
template <class... Sizes>
bool whole_packs(Sizes... sizes) {
  return ((sizes % 8 == 0) && ...);
}

}  // namespace

int gather_tokens_fwd(const GatherTokensFwd& a, Stream stream) {
  const bool whole = all_aligned(a.x, a.add, a.y) && whole_packs(a.dim, a.x_batch, a.x_token);
  return by_pair(a.x_dtype, a.y_dtype, whole, [&](auto x, auto y, auto n) {
    const Slabs slabs = slabs_of(a.dim / n.value);
    const dim3 grid(static_cast<unsigned>(a.batch * a.keep), slabs.count);
    return launch(fwd_kernel<decltype(x), decltype(y), n.value>, grid, dim3(slabs.threads), 0,
                  stream, a);
  });
}

int gather_tokens_bwd(const GatherTokensBwd& a, Stream stream) {
  const bool whole = all_aligned(a.dy, a.dx) && whole_packs(a.dim, a.dy_batch);
  return by_pair(a.dy_dtype, a.dx_dtype, whole, [&](auto dy, auto dx, auto n) {
    const Slabs slabs = slabs_of(a.dim / n.value);
    const dim3 grid(static_cast<unsigned>(a.x_batch * a.tokens), slabs.count);
    return launch(bwd_kernel<decltype(dy), decltype(dx), n.value>, grid, dim3(slabs.threads), 0,
                  stream, a);
  });
}

}  // namespace iv2::cuda
