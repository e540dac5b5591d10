// distill_loss.cpp - mean over rows of 2 - 2 cos(LayerNorm(x) w + b, target row), and its gradients.
//
// A row is read from memory once and then stays in L1: its mean, its variance, seven sums that give
// the cosine and the two means of LayerNorm's backward, and the gradient. Since the loss is a sum
// over rows, dx, dweight and dbias are known before any gradient arrives, up to its factor; they are
// stored times rows * dim, which keeps a float16 dx in range, and backward scales them. Rows are
// parallel; the sums over rows are taken in fixed chunks (kernels.h). Bound by memory: one read of x
// and of the target's rows, one write of dx.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

// torch.nn.functional.cosine_similarity's least norm.
constexpr float kLeastNorm = 1e-8f;

// Four sums side by side: one alone would wait for each addition.
template <class Term>
inline float sum_of(int64_t dim, Term term) {
  Vec total[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * Vec::size <= dim; i += 4 * Vec::size) {
    for (int64_t k = 0; k < 4; ++k)
      total[k] = add(total[k], term(i + k * Vec::size, Vec::size));
  }
  for (; i < dim; i += Vec::size) total[0] = add(total[0], term(i, min_of(Vec::size, dim - i)));
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

struct Stats {
  float mean, rstd;
};

template <class X>
Stats row_stats(const X* x, int64_t dim, float eps) {
  const float count = static_cast<float>(dim);
  const float mean = sum_of(dim, [&](int64_t i, int64_t n) { return load_at(x, i, n); }) / count;
  // lanes past the end hold 0 - mean: they are taken off again
  const float squares = sum_of(dim, [&](int64_t i, int64_t n) {
    const Vec centred = sub(load_at(x, i, n), set(mean));
    return mul(centred, centred);
  });
  const int64_t past = (Vec::size - dim % Vec::size) % Vec::size;
  const float variance = (squares - static_cast<float>(past) * mean * mean) / count;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// Sums over a row of normed = w h + b, with h the normalised x and t the target.
struct Sums {
  float dot, normed, target;  // normed.t, normed.normed, t.t
  float wt, wn, wht, whn;     // sum w t, w normed, w h t, w h normed
};

}  // namespace
}  // namespace iv2::IV2_ISA
