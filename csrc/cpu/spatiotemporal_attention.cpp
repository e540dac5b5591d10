// spatiotemporal_attention.cpp - the full-width RMSNorm of q and k around attention
// (attention.cpp).
//
// With one rstd a token, q_hat . k_hat = (q rstd_q q_weight k_weight) . k rstd_k: attention scales
// q while packing it and multiplies a column of scores by rstd_k, so that neither normed tensor is
// ever stored. Here are the two passes over tokens that remain. Forward takes the rstd. Backward
// gets, in fp32, G = the gradient of q rstd_q gain and H = that of k at fixed rstd_k, and finishes:
//   dq = rstd_q gain G - q rstd_q^2 / C * sum_C(q rstd_q gain G),
//   dk = H - k rstd_k^2 / C * sum_C(k H),      dgain = sum over tokens of rstd_q q G;
// the sums over C, all heads together, are the row and column sums of dS * S. Tokens in parallel,
// bound by memory; dgain in fixed chunks (kernels.h).
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

template <class T>
float reciprocal_rms(const T* x, int64_t dim, float eps) {
  Vec squares = set(0);
  for_each_vec(dim, [&](int64_t i, int64_t n) {
    const Vec value = load_at(x, i, n);
    squares = fma(value, value, squares);
  });
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
}

template <class T>
void norm_fwd(const SpatiotemporalAttentionNormFwd& a) {
  for_row_chunks(a.rows, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* row = static_cast<const T*>(a.qkv) + m * 3 * a.dim;
      a.rstd[m] = reciprocal_rms(row, a.dim, static_cast<float>(a.eps));
      a.rstd[a.rows + m] = reciprocal_rms(row + a.dim, a.dim, static_cast<float>(a.eps));
    }
  });
}

// dq of one token. The chunks of G are summed into the first, which is scratch by now.
template <class T>
void query_gradient(const SpatiotemporalAttentionNormBwd& a, int64_t m, float* g, float* dgain) {
  const T* q = static_cast<const T*>(a.qkv) + m * 3 * a.dim;
  T* dq = static_cast<T*>(a.dqkv) + m * 3 * a.dim;
  const Vec rstd = set(a.rstd[m]);
  Vec dot = set(0);
  for_each_vec(a.dim, [&](int64_t i, int64_t n) {
    Vec total = load_at(g, i, n);
    for (int64_t c = 1; c < a.chunks; ++c)
      total = add(total, load_at(g + c * a.rows * a.dim, i, n));
    store_at(g, total, i, n);
    const Vec product = mul(mul(load_at(q, i, n), rstd), total);
    store_at(dgain, add(load_at(dgain, i, n), product), i, n);
    dot = fma(product, load_at(a.gain, i, n), dot);
  });
  const Vec mean = set(sum(dot) * a.rstd[m] * a.rstd[m] / static_cast<float>(a.dim));
  for_each_vec(a.dim, [&](int64_t i, int64_t n) {
    const Vec direct = mul(mul(load_at(g, i, n), rstd), load_at(a.gain, i, n));
    store_at(dq, sub(direct, mul(load_at(q, i, n), mean)), i, n);
  });
}

template <class T>
void key_gradient(const SpatiotemporalAttentionNormBwd& a, int64_t m) {
  const T* k = static_cast<const T*>(a.qkv) + (m * 3 + 1) * a.dim;
  T* dk = static_cast<T*>(a.dqkv) + (m * 3 + 1) * a.dim;
  const float* h = a.dk_direct + m * a.dim;
  const float rstd = a.rstd[a.rows + m];
  Vec dot = set(0);
  for_each_vec(a.dim,
               [&](int64_t i, int64_t n) { dot = fma(load_at(k, i, n), load_at(h, i, n), dot); });
  const Vec mean = set(sum(dot) * rstd * rstd / static_cast<float>(a.dim));
  for_each_vec(a.dim, [&](int64_t i, int64_t n) {
    store_at(dk, sub(load_at(h, i, n), mul(load_at(k, i, n), mean)), i, n);
  });
}

template <class T>
void norm_bwd(const SpatiotemporalAttentionNormBwd& a) {
  for_row_chunks(a.rows, a.threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dgain = a.scratch + chunk * a.dim;
    for_each_vec(a.dim, [&](int64_t i, int64_t n) { store_at(dgain, set(0), i, n); });
    for (int64_t m = begin; m < end; ++m) {
      query_gradient<T>(a, m, a.dq_partial + m * a.dim, dgain);
      key_gradient<T>(a, m);
    }
  });
  add_chunks(a.scratch, row_chunks(a.rows), a.dim, a.dgain);
}

}  // namespace

void spatiotemporal_attention_norm_fwd(const SpatiotemporalAttentionNormFwd& a) {
  by_dtype(a.dtype, [&](auto x) { norm_fwd<decltype(x)>(a); });
}

void spatiotemporal_attention_norm_bwd(const SpatiotemporalAttentionNormBwd& a) {
  by_dtype(a.dtype, [&](auto x) { norm_bwd<decltype(x)>(a); });
}

}  // namespace iv2::IV2_ISA
