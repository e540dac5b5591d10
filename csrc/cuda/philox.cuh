// philox.cuh - Philox4x32-10 and the logarithm of its words, in the arithmetic of
// csrc/cpu/philox.h and iv2kernels/ops/masks.py, bit for bit: no multiply-add is fused.
#pragma once
#include "xp.cuh"

namespace iv2::cuda {
namespace {

struct PhiloxBlock {
  uint32_t words[4];
};

__device__ __forceinline__ PhiloxBlock philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                              uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word as a number in (0, 1).
__device__ __forceinline__ float uniform_of(uint32_t word) {
  return mul_rn(add_rn(static_cast<float>(static_cast<int32_t>(word >> 9)), 0.5f), 0x1p-23f);
}

__device__ __forceinline__ float minus_log2(float x) {
  const int32_t bits = static_cast<int32_t>(bits_of(x));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f =
      add_rn(float_from_bits(static_cast<uint32_t>(bits - exponent * (1 << 23))), -1.0f);
  const float s = div_rn(f, add_rn(f, 2.0f)), z = mul_rn(s, s);
  float p = add_rn(mul_rn(z, 0.320598900f), 0.412198603f);
  p = add_rn(mul_rn(p, z), 0.577078044f);
  p = add_rn(mul_rn(p, z), 0.961796701f);
  p = add_rn(mul_rn(p, z), 2.88539004f);
  return -add_rn(mul_rn(s, p), static_cast<float>(exponent));
}

}  // namespace
}  // namespace iv2::cuda
