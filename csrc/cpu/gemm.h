// gemm.h - C = A B or C += A B on tiles that lie in cache, and the packing of their operands.
//
// Operands are counted in words of 4 bytes. A word holds one fp32, or two bf16 that are neighbours
// along the depth (the summed axis), which one vdpbf16ps multiplies and adds in fp32. So both
// precisions share one loop: broadcast a word of A, load a vector of words of B, multiply, add to
// fp32. C is kept in registers, tile_rows x kTileVecs vectors, over the whole depth; a panel of B
// (depth x kTileVecs vectors) is read again for every group of rows and should fit in L1.
#pragma once
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

// Rows of a tile of `vecs` vectors: as many as the registers hold, short of one for a word of A and
// `vecs` for B.
#if defined(__AVX512F__)
constexpr int kTileVecs = 6;
constexpr int tile_rows(int vecs) { return vecs > 4 ? 4 : vecs == 4 ? 6 : 8; }
#elif defined(__AVX2__)
constexpr int kTileVecs = 2;
constexpr int tile_rows(int) { return 6; }
#else
constexpr int kTileVecs = 1;
constexpr int tile_rows(int) { return 2; }
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// How operands are stored and multiplied.
struct Fp32Words {
  using Element = float;
  static constexpr int64_t per_word = 1;
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct Bf16Words {
  using Element = bf16;
  static constexpr int64_t per_word = 2;
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return {
        _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
};
#endif

// The words a tensor of T is multiplied in.
template <class T>
struct WordsOf {
  using type = Fp32Words;
};
#if defined(__AVX512BF16__)
template <>
struct WordsOf<bf16> {
  using type = Bf16Words;
};
#endif

template <class Words>
constexpr int64_t words(int64_t n) {
  return (n + Words::per_word - 1) / Words::per_word;
}

// A is [rows, depth] row-major with lda words from row to row, or, transposed, [depth, rows] with
// lda from one step of the depth to the next. B is [depth, cols], C [rows, cols] in fp32.
struct Operands {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t depth;  // in words
};

template <class Words, bool kTransposed, int kRows, int kVecs>
void multiply_tile(const Operands& t, bool add_to_c) {
  Vec c[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) c[i][j] = set(0);
  }
  const float* a = t.a;
  const float* b = t.b;
  for (int64_t k = 0; k < t.depth; ++k) {
    Vec row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * Vec::size);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec word = set(kTransposed ? a[i] : a[i * t.lda]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) c[i][j] = Words::multiply_add(word, row[j], c[i][j]);
    }
    a += kTransposed ? t.lda : 1;
    b += t.ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      // Added at the end: a sum of short sums rounds less than one long chain.
      float* out = t.c + i * t.ldc + j * Vec::size;
      store(out, add_to_c ? add(load(out), c[i][j]) : c[i][j]);
    }
  }
}

// The last rows, fewer than tile_rows(kVecs).
template <class Words, bool kTransposed, int kVecs, int kRows = tile_rows(kVecs) - 1>
inline void multiply_last_rows(const Operands& t, int64_t rows, bool add_to_c) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      multiply_tile<Words, kTransposed, kRows, kVecs>(t, add_to_c);
    else
      multiply_last_rows<Words, kTransposed, kVecs, kRows - 1>(t, rows, add_to_c);
  }
}

// One panel of kVecs vectors of columns; fewer, found by recursion, when vecs says so.
template <class Words, bool kTransposed, int kVecs = kTileVecs>
inline void multiply_panel(Operands t, int64_t rows, int64_t vecs, bool add_to_c) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) {
      multiply_panel<Words, kTransposed, kVecs - 1>(t, rows, vecs, add_to_c);
      return;
    }
  }
  constexpr int kRows = tile_rows(kVecs);
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<Words, kTransposed, kRows, kVecs>(t, add_to_c);
    t.a += kTransposed ? kRows : kRows * t.lda;
    t.c += kRows * t.ldc;
  }
  multiply_last_rows<Words, kTransposed, kVecs>(t, rows, add_to_c);
}

// C[rows, vecs * Vec::size] = or += A B; whole vectors of B and C are touched. Parts are of equal
// size: 8 vectors are 4 + 4, which feed the multipliers better than 6 + 2, and no panel of B is
// deeper than what L1 holds and what a chain of fp32 additions should be.
template <class Words, bool kTransposed = false>
void multiply(const Operands& all, int64_t rows, int64_t vecs, bool add_to_c) {
  constexpr int64_t kMaxDepth = 96;
  int64_t column = 0;
  for (int64_t panels = (vecs + kTileVecs - 1) / kTileVecs; panels > 0; --panels) {
    const int64_t width = (vecs - column + panels - 1) / panels;
    Operands t = all;
    t.b += column * Vec::size;
    t.c += column * Vec::size;
    int64_t left = all.depth;
    for (int64_t parts = (left + kMaxDepth - 1) / kMaxDepth; parts > 0; --parts) {
      t.depth = (left + parts - 1) / parts;
      multiply_panel<Words, kTransposed>(t, rows, width, add_to_c || left < all.depth);
      t.a += kTransposed ? t.depth * t.lda : t.depth;
      t.b += t.depth * t.ldb;
      left -= t.depth;
    }
    column += width;
  }
}

template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + i);
  __builtin_prefetch(row + dim - 1);
}

// Rows of a tensor as an operand A: dst[r] = src[r] * row_scale[r] * gain, in words. Rows from n to
// n_padded, and elements from dim to a whole vector, are zero. gain and row_scale: both or neither.
// Rows of one head lie a token apart, where no hardware prefetcher follows.
template <class Words, class T>
void pack_rows(const T* src, int64_t step, int64_t n, int64_t n_padded, int64_t dim,
               const float* row_scale, const float* gain, float* dst, int64_t ld) {
  using Element = typename Words::Element;
  for (int64_t r = 0; r < n_padded; ++r) {
    const T* in = src + r * step;
    prefetch_row(in + 8 * step, dim);
    Element* out = reinterpret_cast<Element*>(dst + r * ld);
    for_each_vec(dim, [&](int64_t i, int64_t count) {
      Vec x = r < n ? load_at(in, i, count) : set(0);
      if (gain && r < n) x = mul(mul(x, set(row_scale[r])), load_at(gain, i, count));
      store(out + i, x);
    });
  }
}

#if defined(__AVX512F__)
// 16 x 16 words, from rows `ld` apart to rows `ld_out` apart.
inline void transpose_square(const float* in, int64_t ld, float* out, int64_t ld_out) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ld);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each 4 x 4 square of rows i .. i + 3
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // gather the 128-bit quarters
    const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);
    const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const __m512 low23 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    _mm512_storeu_ps(out + c * ld_out, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + (c + 4) * ld_out, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + (c + 8) * ld_out, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + (c + 12) * ld_out, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}
#elif defined(__AVX2__)
// 8 x 8 words, from rows `ld` apart to rows `ld_out` apart.
inline void transpose_square(const float* in, int64_t ld, float* out, int64_t ld_out) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * ld);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(out + c * ld_out, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
    _mm256_storeu_ps(out + (c + 4) * ld_out, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
  }
}
#else
inline void transpose_square(const float* in, int64_t ld, float* out, int64_t ld_out) {
  for (int i = 0; i < Vec::size; ++i)
    for (int j = 0; j < Vec::size; ++j) out[j * ld_out + i] = in[i * ld + j];
}
#endif

// Packed rows as an operand B whose depth is the row: dst[k, r] = rows[r, k]. Whole squares of
// vectors are written.
inline void transpose_words(const float* rows, int64_t ld, int64_t n_padded, int64_t depth,
                            float* dst, int64_t ld_out) {
  for (int64_t r = 0; r < n_padded; r += Vec::size)
    for (int64_t k = 0; k < depth; k += Vec::size)
      transpose_square(rows + r * ld + k, ld, dst + k * ld_out + r, ld_out);
}

// Packed rows as an operand B whose depth runs over the rows: dst[r / per_word, c] = rows[r, c].
template <class Words>
void stack_words(const float* rows, int64_t ld, int64_t n, int64_t dim, float* dst,
                 int64_t ld_out) {
  for (int64_t r = 0; r < n; r += Words::per_word) {
    float* out = dst + r / Words::per_word * ld_out;
    for (int64_t c = 0; c < dim; c += Vec::size) {
      if constexpr (Words::per_word == 1) {
        store(out + c, load(rows + r * ld + c));
      } else {
#if defined(__AVX512BF16__)
        const auto half = [&](int64_t row) {
          const auto* p = reinterpret_cast<const uint16_t*>(rows + row * ld) + c;
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        };
        const __m512i low = half(r);
        const __m512i high = r + 1 < n ? half(r + 1) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
      }
    }
  }
}

}  // namespace
}  // namespace iv2::IV2_ISA
