// attention.h - what forward and backward of attention.cpp share: which keys a query sees, e^score,
// where a sequence lies, and packing its rows.
#pragma once
#include "../kernels.h"
#include "gemm.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kBlock = kAttentionBlock;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();
// +inf where a key is visible, for min(mask, scores).
constexpr int64_t kMaskSpan = 2 * kBlock;
struct MaskTable {
  float v[3 * kMaskSpan];
  constexpr MaskTable() : v() {
    for (int64_t i = 0; i < 3 * kMaskSpan; ++i)
      v[i] = i >= kMaskSpan && i < 2 * kMaskSpan ? -kInfinity : kInfinity;
  }
};
constexpr MaskTable kMask;
inline const float* keep_below(int64_t limit) { return kMask.v + kMaskSpan - limit; }
inline const float* keep_from(int64_t first) { return kMask.v + 2 * kMaskSpan - first; }

// Scores are kept in units of 1 where fp32 accuracy is due, as log2(e) would round them once more,
// and in units of log2 otherwise.
template <class Words>
constexpr float kPerNat = Words::per_word == 2 ? kLog2E : 1.0f;

// e^x of such scores, x at most about 8; NaN stays NaN. The polynomials for 2^f are minimax on
// [-1/2, 1/2]: relative error 2e-9, and 3e-6 where the result is rounded to bf16.
template <class Words>
inline Vec exp_of_score(Vec x) {
  if constexpr (Words::per_word == 1) x = mul(x, set(kLog2E));
  x = max(set(-160.0f), x);
  const Vec n = round(x), f = sub(x, n);
  Vec p;
  if constexpr (Words::per_word == 2) {
    p = fma(set(9.5701019e-3f), f, set(5.5917860e-2f));
    p = fma(p, f, set(2.40247448e-1f));
    p = fma(p, f, set(6.93121815e-1f));
  } else {
    p = fma(set(1.53458120e-4f), f, set(1.33999312e-3f));
    p = fma(p, f, set(9.61848896e-3f));
    p = fma(p, f, set(5.55032878e-2f));
    p = fma(p, f, set(2.40226466e-1f));
    p = fma(p, f, set(6.93147206e-1f));
  }
  return scale_by_power(fma(p, f, set(1.0f)), n);
}

// Where one sequence begins: its row in a strided tensor, its token number, its length.
struct Sequence {
  int64_t batch, q_row, q_token, q_len, k_row, k_token, k_len;
  int64_t unseen;  // causal: query i sees keys up to i - unseen
};
template <class Args>
inline Sequence sequence(const Args& a, int64_t b) {
  Sequence s{b, 0, b * a.q_len, a.q_len, 0, b * a.k_len, a.k_len, 0};
  if (a.cu_seqlens_q) {
    const int64_t q = a.cu_seqlens_q[b], k = a.cu_seqlens_k[b];
    s = {0, q, q, a.cu_seqlens_q[b + 1] - q, k, k, a.cu_seqlens_k[b + 1] - k, 0};
  }
  s.unseen = s.q_len - s.k_len;
  return s;
}

// Some tokens, and the runs [first, end) of the other side's tokens that they see.
struct Tile {
  int64_t first, count;
  const int32_t *runs, *runs_end;
};
template <class Args>
inline Tile listed_tile(const Args& a, int64_t i) {
  const int32_t* t = a.tiles + 4 * i;
  return {t[0], t[1], a.runs + 2 * t[2], a.runs + 2 * t[3]};
}

// Packs rows of q, k or v of one head, from token `first` of a sequence on.
template <class Words>
struct Packer {
  int64_t dim, ld;
  explicit Packer(int64_t head_dim) : dim(head_dim), ld(round_up(words<Words>(head_dim), 16)) {}

  template <class T, class Args>
  void queries(const Args& a, const Sequence& s, int64_t head, int64_t first, int64_t n,
               int64_t n_padded, float* dst) const {
    const T* rows = static_cast<const T*>(a.q) + s.batch * a.q_batch +
                    (s.q_row + first) * a.q_token + head * a.q_head;
    pack_rows<Words>(rows, a.q_token, n, n_padded, dim,
                     a.q_gain ? a.q_rstd + s.q_token + first : nullptr,
                     a.q_gain ? a.q_gain + head * dim : nullptr, dst, ld);
  }
  template <class T, class Args>
  void keys(const Args& a, const Sequence& s, int64_t head, int64_t first, int64_t n,
            int64_t n_padded, float* dst) const {
    const T* rows = static_cast<const T*>(a.k) + s.batch * a.k_batch +
                    (s.k_row + first) * a.k_token + head * a.k_head;
    pack_rows<Words, T>(rows, a.k_token, n, n_padded, dim, nullptr, nullptr, dst, ld);
  }
  template <class T, class Args>
  void values(const Args& a, const Sequence& s, int64_t head, int64_t first, int64_t n,
              float* dst) const {
    const T* rows = static_cast<const T*>(a.v) + s.batch * a.v_batch +
                    (s.k_row + first) * a.v_token + head * a.v_head;
    pack_rows<Words, T>(rows, a.v_token, n, n, dim, nullptr, nullptr, dst, ld);
  }
};

inline float* take(float*& p, int64_t floats) {
  float* taken = p;
  p += floats;
  return taken;
}

// Probabilities as words of an operand A.
template <class Words, int kVecs>
inline void store_words(float* dst, const Vec* p) {
  if constexpr (Words::per_word == 1) {
    for (int v = 0; v < kVecs; ++v) store(dst + v * Vec::size, p[v]);
  } else {
#if defined(__AVX512BF16__)
    for (int v = 0; v + 1 < kVecs; v += 2)
      _mm512_storeu_si512(dst + v * 8,
                          reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(p[v + 1].v, p[v].v)));
    if (kVecs % 2) store(reinterpret_cast<bf16*>(dst) + (kVecs - 1) * 16, p[kVecs - 1]);
#endif
  }
}

}  // namespace
}  // namespace iv2::IV2_ISA
