// philox.h - Philox4x32-10 and the logarithm of its words, in arithmetic that every implementation
// repeats bit for bit (iv2kernels/ops/masks.py). Plain loops over arrays of fixed length, for the
// compiler to vectorise; no multiply-add is fused.
#pragma once
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kBlocks = 32;          // Philox blocks at a time,
constexpr int64_t kWords = 4 * kBlocks;  // of four words each

// The ten rounds on kBlocks counters, of which number i has the 64-bit key key(i). A 32-bit word
// sits in 64 bits, whose upper half is ignored: so the compiler finds the multiply.
template <class Key>
inline void philox(uint64_t (&c)[4][kBlocks], Key key) {
  for (uint32_t round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < kBlocks; ++i) {
      const uint64_t k = key(i);
      const uint32_t k0 = static_cast<uint32_t>(k) + round * 0x9E3779B9u;
      const uint32_t k1 = static_cast<uint32_t>(k >> 32) + round * 0xBB67AE85u;
      const uint64_t p0 = (c[0][i] & 0xFFFFFFFFu) * 0xD2511F53u;
      const uint64_t p1 = (c[2][i] & 0xFFFFFFFFu) * 0xCD9E8D57u;
      c[0][i] = (p1 >> 32) ^ c[1][i] ^ k0;
      c[1][i] = p1;
      c[2][i] = (p0 >> 32) ^ c[3][i] ^ k1;
      c[3][i] = p0;
    }
  }
}

// A word as a number in (0, 1).
inline float uniform_of(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) *
         1.1920928955078125e-7f;  // 2^-23
}

inline float minus_log2(float x) {
  const int32_t bits = static_cast<int32_t>(bits_of(x));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_from_bits(static_cast<uint32_t>(bits - exponent * (1 << 23))) - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  float p = z * 0.320598900f + 0.412198603f;
  p = p * z + 0.577078044f;
  p = p * z + 0.961796701f;
  p = p * z + 2.88539004f;
  return -(s * p + static_cast<float>(exponent));
}

}  // namespace
}  // namespace iv2::IV2_ISA
