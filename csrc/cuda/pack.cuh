// pack.cuh - N consecutive elements of a row, moved by the widest words that fill them, and how a
// block shares a row: thread t has packs t, t + blockDim.x, ...
#pragma once
#include "xp.cuh"

namespace iv2::cuda {
namespace {

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

template <int bytes>
struct WordOf {
  using type = Word16;
};
template <>
struct WordOf<8> {
  using type = Word8;
};
template <>
struct WordOf<4> {
  using type = Word4;
};
template <>
struct WordOf<2> {
  using type = Word2;
};
template <>
struct WordOf<1> {
  using type = Word1;
};

// p is a multiple of the pack's alignment.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  using Word = typename WordOf<N * sizeof(T)>::type;
  Pack<T, N> pack;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(pack) / sizeof(Word)); ++w) {
    reinterpret_cast<Word*>(&pack)[w] = read(reinterpret_cast<const Word*>(p) + w);
  }
  return pack;
}
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_cached(const T* p) {
  using Word = typename WordOf<N * sizeof(T)>::type;
  Pack<T, N> pack;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(pack) / sizeof(Word)); ++w) {
    reinterpret_cast<Word*>(&pack)[w] = read_cached(reinterpret_cast<const Word*>(p) + w);
  }
  return pack;
}
template <class T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  using Word = typename WordOf<N * sizeof(T)>::type;
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(pack) / sizeof(Word)); ++w) {
    write(reinterpret_cast<Word*>(p) + w, reinterpret_cast<const Word*>(&pack)[w]);
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> from_floats(const float (&x)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < N; ++j) pack.v[j] = x[j];
  } else if constexpr (N == 1) {
    pack.v[0].bits = static_cast<uint16_t>(pack_pair<T>(x[0], 0.0f));
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const uint32_t pair = pack_pair<T>(x[j], x[j + 1]);
      pack.v[j].bits = static_cast<uint16_t>(pair);
      pack.v[j + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  }
  return pack;
}

// Elements a pack: those of the narrower type fill 16 bytes.
template <class A, class B>
constexpr int pack_size = 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// body(i, k) for this thread's packs of a row, which begin at element i. Of K > 0 packs at most,
// number k can stay in registers; K = 0 is for rows of any length, and k is 0.
template <int N, int K, class Body>
__device__ __forceinline__ void for_packs(int64_t dim, Body body) {
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t i = (int64_t{k} * blockDim.x + threadIdx.x) * N;
      if (i < dim) body(i, k);
    }
  } else {
    for (int64_t i = int64_t{threadIdx.x} * N; i < dim; i += int64_t{blockDim.x} * N) body(i, 0);
  }
}

// Threads of a block at most, by the K of for_packs.
template <int K>
constexpr int kRowThreads = K == 2 ? 512 : 256;

// The K of for_packs: 1 or 2, or 0 where a row does not fit the registers of a block or is not made
// of whole, aligned packs; and the threads of a block.
struct RowShape {
  int packs;
  unsigned threads;
};
inline RowShape row_shape(int64_t dim, int pack, bool aligned) {
  const int64_t packs = dim / pack;
  if (!aligned || dim % pack != 0 || packs > 2 * kRowThreads<2>) {
    const int64_t threads = (dim + 31) / 32 * 32;
    return {0, static_cast<unsigned>(threads < kRowThreads<0> ? threads : kRowThreads<0>)};
  }
  const int each = packs <= kRowThreads<1> ? 1 : 2;
  return {each, static_cast<unsigned>((packs + 32 * each - 1) / (32 * each) * 32)};
}
template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A number as a type: of f's argument Int<n>, `.value` is a constant.
template <int n>
using Int = std::integral_constant<int, n>;

// f(T{}) for the C++ type of a DType.
template <class F>
int by_dtype(int64_t dtype, F f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(bf16{});
  return f(f16{});
}

}  // namespace
}  // namespace iv2::cuda
