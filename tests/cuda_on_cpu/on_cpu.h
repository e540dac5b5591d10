// on_cpu.h - the twins of csrc/cuda/xp.cuh: the same names with the same meaning, on engine.h. This
// is compiled with the kernel and its sanitizer, the engine is not: a load or store that a GPU
// thread would make is made here.
#pragma once
#include <cmath>

#include "engine.h"

#define __global__ static
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (shim::position->thread)
#define blockIdx (shim::position->block)
#define blockDim (shim::position->block_size)
#define gridDim (shim::position->grid)

// The address of a static object stands for this place in the code.
#define IV2_SHARED(T, name, extents)       \
  using name##_type = T extents;           \
  const void* name##_tag = [] {            \
    static const char tag = 0;             \
    return static_cast<const void*>(&tag); \
  }();                                     \
  name##_type& name =                      \
      *static_cast<name##_type*>(shim::static_shared(name##_tag, sizeof(name##_type)))
#define IV2_SHARED_DYNAMIC(T, name) T* name = static_cast<T*>(shim::dynamic_shared())

struct __attribute__((may_alias, aligned(8))) uint2 {
  uint32_t x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};

namespace iv2::cuda {

using Word1 = uint8_t;
using Word2 = uint16_t __attribute__((may_alias));
using Word4 = uint32_t __attribute__((may_alias));
using Word8 = uint2;
using Word16 = uint4;

using shim::Site;
// As a default argument: the caller's place.
inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

template <class T>
__forceinline__ T read(const T* p) {
  shim::record(shim::Access::kRead, p, sizeof(T));
  return *p;
}
template <class T>
__forceinline__ T read_cached(const T* p) {
  shim::record(shim::Access::kReadCached, p, sizeof(T));
  return *p;
}
template <class T>
__forceinline__ void write(T* p, T value) {
  shim::record(shim::Access::kWrite, p, sizeof(T));
  *p = value;
}
template <class T>
__forceinline__ T read_shared(const T* p) {
  shim::record(shim::Access::kShared, p, sizeof(T));
  return *p;
}
template <class T>
__forceinline__ void write_shared(T* p, T value) {
  shim::record(shim::Access::kShared, p, sizeof(T));
  *p = value;
}

inline void sync_block(Site site = here()) { shim::sync_block(site); }
inline void sync_warp(unsigned lanes = kAllLanes, Site site = here()) {
  shim::sync_warp(lanes, site);
}

inline int lane_index() { return shim::position->index % 32; }
template <class T>
T shuffle_from(T value, int lane, Site site) {
  static_assert(sizeof(T) <= 16);
  shim::shuffle(kAllLanes, &value, sizeof(T), lane, site);
  return value;
}
template <class T>
T shuffle_xor(T value, int lane_mask, Site site = here()) {
  return shuffle_from(value, lane_index() ^ lane_mask, site);
}
template <class T>
T shuffle_up(T value, int lanes, Site site = here()) {
  return shuffle_from(value, lane_index() - lanes, site);
}
template <class T>
T shuffle(T value, int lane, Site site = here()) {
  return shuffle_from(value, lane, site);
}
inline unsigned ballot(bool yes, Site site = here()) { return shim::ballot(kAllLanes, yes, site); }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int first_bit(unsigned bits) { return __builtin_ctz(bits); }

inline void add_atomically(int32_t* p, int32_t value) {
  __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

// Compiled with -ffp-contract=off.
inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float exp2_fast(float x) { return __builtin_exp2f(x); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 0x1Fu,
                 mantissa = x.bits & 0x3FFu;
  if (exponent == 0) {  // zero or denormal
    return float_from_bits(bits_of(static_cast<float>(mantissa) * 0x1p-24f) | sign);
  }
  return float_from_bits(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) |
                         mantissa << 13);
}

inline uint32_t bits16(float x, bf16) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t bits16(float x, f16) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7FFF;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;
  if (magnitude < 0x38800000u) {  // denormal: adding 0.5 puts the rounded mantissa in the low bits
    return sign | (bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f));
  }
  return sign | (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
}
template <class T>
uint32_t pack_pair(float first, float second) {
  return bits16(first, T{}) | bits16(second, T{}) << 16;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here()) {
  shim::mma(d, a, b, std::is_same_v<T, bf16>, site);
}
inline void read_row(uint16_t (&row)[8], const void* p) {
  for (int i = 0; i < 8; ++i) row[i] = static_cast<const Word2*>(p)[i];
}
inline void ldmatrix(uint32_t (&tiles)[4], const void* p, Site site = here()) {
  uint16_t row[8];
  read_row(row, p);
  shim::ldmatrix(tiles, row, p, false, site);
}
inline void ldmatrix_transposed(uint32_t (&tiles)[4], const void* p, Site site = here()) {
  uint16_t row[8];
  read_row(row, p);
  shim::ldmatrix(tiles, row, p, true, site);
}

// Lands as late as it may; until then the target is NaN.
__forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  shim::record(shim::Access::kShared, shared, 16);
  if (valid) shim::record(shim::Access::kRead, global, 16);
  *static_cast<Word16*>(shared) = {~0u, ~0u, ~0u, ~0u};
  shim::copy_begin({shared, global, valid});
}
inline void copy_async_commit() { shim::copy_commit(); }
template <int n>
void copy_async_wait() {
  shim::Copy copy;
  while (shim::copy_landing(n, &copy)) {
    *static_cast<Word16*>(copy.shared) =
        copy.valid ? *static_cast<const Word16*>(copy.global) : Word16{0, 0, 0, 0};
  }
}

template <class... Parameters, class... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream,
           const Args&... args) {
  return shim::launch(grid, block, shared, [&] { kernel(args...); });
}

}  // namespace iv2::cuda
