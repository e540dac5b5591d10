// vec.h - Vec: as many floats as this build's registers hold, and loads and stores that convert.
//
// Everything is in an unnamed namespace inside the namespace of the instruction set: no symbol of
// an AVX build may be one that the linker could pick for another (tests/native/test_symbols.py
// reads the object files). For the same reason nothing here calls an inline function of the
// standard library.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../kernels.h"

namespace iv2::IV2_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
inline T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T max_of(T a, T b) {
  return a > b ? a : b;
}

inline float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return float_from_bits(bits_of(magnitude) | sign);
  }
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

// Round to nearest even; NaN stays NaN.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#else
  const uint32_t bits = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // denormal: adding 0.5 puts the rounded mantissa in the low bits
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

#if defined(__AVX512F__)

struct Vec {
  __m512 v;
  static constexpr int64_t size = 16;
};
inline Vec set(float s) { return {_mm512_set1_ps(s)}; }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec widen(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
inline Vec load(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}
inline Vec load(const uint8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
inline __m256i narrow_bf16(Vec a) {
#if defined(__AVX512BF16__)
  // vcvtneps2bf16 flushes denormals to zero, as vdpbf16ps does.
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline __m256i narrow_f16(Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
inline void store(bf16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a));
}
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a));
}
inline void store(f16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a));
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float max_across(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline bool any_above(Vec a, float limit) {
  return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}
// a with the lanes from n on set to 0.
inline Vec keep_first(Vec a, int64_t n) { return {_mm512_maskz_mov_ps(first(n), a.v)}; }
// Lane by lane: yes where a < b, else no.
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n; saturates to 0 and infinity.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_set1_epi32(static_cast<int>(0x80000000u)), _mm512_castps_si512(sign.v),
      _mm512_castps_si512(magnitude.v), 0xCA))};
}

#elif defined(__AVX2__)

struct Vec {
  __m256 v;
  static constexpr int64_t size = 8;
};
inline Vec set(float s) { return {_mm256_set1_ps(s)}; }
inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
inline Vec widen(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline __m128i load_16bit(const void* p, int64_t n) {
  alignas(16) uint16_t part[8] = {};
  memcpy(part, p, static_cast<size_t>(n) * 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
inline Vec load(const bf16* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const bf16* p, int64_t n) { return widen(load_16bit(p, n)); }
inline Vec load(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec load(const f16* p, int64_t n) { return {_mm256_cvtph_ps(load_16bit(p, n))}; }
inline Vec load(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}
inline Vec load(const uint8_t* p, int64_t n) {
  uint8_t bytes[8] = {};
  memcpy(bytes, p, static_cast<size_t>(n));
  return load(bytes);
}
inline __m128i narrow_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
}
inline __m128i narrow_f16(Vec a) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store_16bit(void* p, __m128i a, int64_t n) {
  alignas(16) uint16_t part[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), a);
  memcpy(p, part, static_cast<size_t>(n) * 2);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
inline void store(bf16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a));
}
inline void store(bf16* p, Vec a, int64_t n) { store_16bit(p, narrow_bf16(a), n); }
inline void store(f16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(a)); }
inline void store(f16* p, Vec a, int64_t n) { store_16bit(p, narrow_f16(a), n); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_across(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline bool any_above(Vec a, float limit) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
}
inline Vec keep_first(Vec a, int64_t n) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(first(n)))};
}
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// Two factors, so that 2^n itself may leave the range of a float while a * 2^n does not.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i clamped = _mm256_cvtps_epi32(
      _mm256_min_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-252.f)), _mm256_set1_ps(252.f)));
  const __m256i half = _mm256_srai_epi32(clamped, 1);
  const __m256i rest = _mm256_sub_epi32(clamped, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 p = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 q = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, p), q)};
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, magnitude.v))};
}

#else

// Eight floats in an array: the compiler maps the loops to what the baseline machine has (SSE2,
// NEON), and sums are taken in eight parts, which keeps their rounding close to the other builds'.
struct Vec {
  float v[8];
  static constexpr int64_t size = 8;
};
template <class F>
inline Vec each(F f) {
  Vec out;
  for (int i = 0; i < 8; ++i) out.v[i] = f(i);
  return out;
}
inline Vec set(float s) {
  return each([&](int) { return s; });
}
template <class T>
inline Vec load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vec load(const T* p, int64_t n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < 8; ++i) p[i] = from_float<T>(a.v[i]);
}
template <class T>
inline void store(T* p, Vec a, int64_t n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline float sum(Vec a) {
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
inline float max_across(Vec a) {
  for (int i = 1; i < 8; ++i) a.v[0] = max_of(a.v[0], a.v[i]);
  return a.v[0];
}
inline bool any_above(Vec a, float limit) {
  for (float x : a.v)
    if (x > limit) return true;
  return false;
}
inline Vec keep_first(Vec a, int64_t n) {
  return each([&](int i) { return i < n ? a.v[i] : 0.0f; });
}
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
}
inline Vec round(Vec a) {
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
inline Vec scale_by_power(Vec a, Vec n) {
  return each([&](int i) {
    return __builtin_ldexpf(a.v[i], static_cast<int>(max_of(-300.f, min_of(300.f, n.v[i]))));
  });
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return each([&](int i) { return __builtin_copysignf(magnitude.v[i], sign.v[i]); });
}

#endif

// 2^x to about 1 ulp: x = n + f with |f| <= 1/2, a polynomial in f (Taylor of 2^f in f ln 2, degree
// 7).
inline Vec exp2(Vec x) {
  x = min(max(x, set(-200.f)), set(200.f));
  const Vec n = round(x);
  const Vec f = sub(x, n);
  Vec p = set(1.5252733804e-5f);
  p = fma(p, f, set(1.5403530394e-4f));
  p = fma(p, f, set(1.3333558146e-3f));
  p = fma(p, f, set(9.6181291076e-3f));
  p = fma(p, f, set(5.5504108665e-2f));
  p = fma(p, f, set(2.4022650696e-1f));
  p = fma(p, f, set(6.9314718056e-1f));
  p = fma(p, f, set(1.0f));
  return scale_by_power(p, n);
}

// e^x to about 1 ulp; x is reduced by n ln 2 in two parts, since x log2(e) alone would round.
inline Vec exp(Vec x) {
  x = min(max(x, set(-104.f)), set(104.f));
  const Vec n = round(mul(x, set(1.44269504088896341f)));
  Vec r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  Vec p = set(1.9841269841e-4f);
  p = fma(p, r, set(1.3888888889e-3f));
  p = fma(p, r, set(8.3333333333e-3f));
  p = fma(p, r, set(4.1666666667e-2f));
  p = fma(p, r, set(1.6666666667e-1f));
  p = fma(p, r, set(5.0e-1f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  return scale_by_power(p, n);
}

// body(load-or-store length) over a row: whole vectors, then the tail. body(i, n) has n ==
// Vec::size or less.
template <class Body>
inline void for_each_vec(int64_t dim, Body body) {
  int64_t i = 0;
  for (; i + Vec::size <= dim; i += Vec::size) body(i, Vec::size);
  if (i < dim) body(i, dim - i);
}
template <class T>
inline Vec load_at(const T* p, int64_t i, int64_t n) {
  return n == Vec::size ? load(p + i) : load(p + i, n);
}
template <class T>
inline void store_at(T* p, Vec a, int64_t i, int64_t n) {
  if (n == Vec::size)
    store(p + i, a);
  else
    store(p + i, a, n);
}

// The sum over a row of term(i, n), a Vec; four partial sums, since one would be a chain of
// dependent adds and would round more. term must give zeros beyond the tail.
template <class Term>
inline float sum_over(int64_t dim, Term term) {
  Vec part[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * Vec::size <= dim; i += 4 * Vec::size)
    for (int64_t j = 0; j < 4; ++j) part[j] = add(part[j], term(i + j * Vec::size, Vec::size));
  for (; i < dim; i += Vec::size) part[0] = add(part[0], term(i, min_of(dim - i, Vec::size)));
  return sum(add(add(part[0], part[1]), add(part[2], part[3])));
}

// body(i) for i in [0, n). No parallel region at one thread: a forked worker must not touch
// OpenMP's pool.
template <class Body>
inline void parallel_for(int64_t n, int64_t threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(min_of(threads, n)))
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t i = 0; i < n; ++i) body(i);
}

// Which of the `threads` of parallel_for runs this: the index of its scratch.
inline int64_t thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// body(chunk, begin, end) over the fixed row chunks of kernels.h.
template <class Body>
inline void for_row_chunks(int64_t rows, int64_t threads, Body body) {
  const int64_t chunks = row_chunks(rows);
  parallel_for(chunks, threads,
               [&](int64_t c) { body(c, rows * c / chunks, rows * (c + 1) / chunks); });
}

// out[i] = sum over chunks, in order, of scratch[chunk, i].
inline void add_chunks(const float* scratch, int64_t chunks, int64_t dim, float* out) {
  for_each_vec(dim, [&](int64_t i, int64_t n) {
    Vec total = load_at(scratch, i, n);
    for (int64_t c = 1; c < chunks; ++c) total = add(total, load_at(scratch + c * dim, i, n));
    store_at(out, total, i, n);
  });
}

// f(T{}) for the C++ type of a DType.
template <class F>
inline void by_dtype(int64_t dtype, F f) {
  if (dtype == kFloat32)
    f(float{});
  else if (dtype == kBFloat16)
    f(bf16{});
  else
    f(f16{});
}

}  // namespace
}  // namespace iv2::IV2_ISA
