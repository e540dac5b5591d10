// linear_cross_entropy.cpp - softmax, loss and the gradient of the logits, over one chunk of them.
//
// The GEMMs around it are the library's (native/linear_cross_entropy.py): a chunk has all V columns
// of some rows, small enough to stay in cache between its GEMMs. First each row, in blocks that
// stay in L1, finds its running maximum, sum of exponentials and sum of logits, and its loss. Then,
// in blocks of columns, p - y is formed in float32, summed over rows for the bias, scaled, and
// rounded once as it overwrites the logits. Rows, then column blocks, are parallel, and each sum
// is taken by one thread in one order. Bound by the exponentials, two for each logit; about 2 % of
// the GEMMs.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kBlock = 512, kGroup = 16;
constexpr float kLowest = -3.402823466e38f;

struct RowSums {
  float peak;
  double exps, logits;
};

// NaN in a logit is lost by max and exp, and kept by the sum of logits.
template <class T>
RowSums sums_of(const T* logits, int64_t dim) {
  RowSums s = {kLowest, 0, 0};
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    const T* block = logits + begin;
    const int64_t size = min_of(kBlock, dim - begin);
    Vec highest = set(kLowest);
    for_each_vec(size, [&](int64_t i, int64_t n) {
      if (n == Vec::size) {
        highest = max(load(block + i), highest);
        return;
      }
      // one by one: lanes past the end would hold 0, which may be above every logit
      for (; n > 0; --n, ++i) highest = max(set(to_float(block[i])), highest);
    });
    const float peak = max_of(s.peak, max_across(highest));
    if (peak > s.peak) s.exps *= __builtin_exp(static_cast<double>(s.peak) - peak);
    s.peak = peak;
    s.exps += sum_over(size, [&](int64_t i, int64_t n) {
      return keep_first(exp(sub(load_at(block, i, n), set(peak))), n);
    });
    s.logits += sum_over(size, [&](int64_t i, int64_t n) { return load_at(block, i, n); });
  }
  if (s.logits != s.logits) s.exps = s.logits;
  return s;
}

template <class T>
void row_losses(const LinearCrossEntropyFwd& a) {
  const double smooth = a.label_smoothing / static_cast<double>(a.vocabulary);
  parallel_for(a.rows, a.threads, [&](int64_t m) {
    const T* logits = static_cast<const T*>(a.logits) + m * a.vocabulary;
    const RowSums s = sums_of(logits, a.vocabulary);
    const double target = to_float(logits[a.target[m]]);
    double loss = __builtin_log(s.exps) + (s.peak - target);
    // with the weights of all classes adding up to 1, the log-sum is subtracted once
    if (smooth > 0) loss += a.label_smoothing * target - smooth * s.logits;
    a.losses[m] = loss;
    a.stats[m] = s.peak;
    a.stats[a.rows + m] = static_cast<float>(a.scale / s.exps);
  });
}

// What y takes from the gradient at the target, beyond smoothing's share.
inline float hit_of(const LinearCrossEntropyFwd& a) {
  return static_cast<float>((1 - a.label_smoothing) * a.scale);
}

// (p - y) * scale for some columns of a row; to `sum`, when given, p * scale and smoothing's share.
template <class T>
void row_grads(const LinearCrossEntropyFwd& a, int64_t m, int64_t begin, int64_t size, float* sum) {
  T* logits = static_cast<T*>(a.logits) + m * a.vocabulary + begin;
  const Vec peak = set(a.stats[m]), by_exp = set(a.stats[a.rows + m]);
  const double smooth = a.label_smoothing / static_cast<double>(a.vocabulary);
  const Vec minus = set(static_cast<float>(-smooth * a.scale));
  const int64_t at = a.target[m] - begin;
  const bool here = at >= 0 && at < size;
  const float target = here ? to_float(logits[at]) : 0;
  for_each_vec(size, [&](int64_t i, int64_t n) {
    const Vec d = fma(exp(sub(load_at(logits, i, n), peak)), by_exp, minus);
    if (sum) store_at(sum, add(d, load_at(sum, i, n)), i, n);
    store_at(logits, d, i, n);
  });
  if (!here) return;
  const Vec d = sub(fma(exp(sub(set(target), peak)), by_exp, minus), set(hit_of(a)));
  store(logits + at, d, 1);
}

inline void add_to(float* total, const float* part, int64_t size) {
  for_each_vec(size, [&](int64_t i, int64_t n) {
    store_at(total, add(load_at(total, i, n), load_at(part, i, n)), i, n);
  });
}

// Some columns of all rows. The bias's sum: p in groups of rows, then the targets, which are large.
template <class T>
void column_grads(const LinearCrossEntropyFwd& a, int64_t begin, int64_t size) {
  float part[kBlock], total[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) total[i] = 0;
  for (int64_t first = 0; first < a.rows; first += kGroup) {
    for (int64_t i = 0; i < kBlock; ++i) part[i] = 0;
    for (int64_t m = first; m < min_of(first + kGroup, a.rows); ++m)
      row_grads<T>(a, m, begin, size, a.dbias ? part : nullptr);
    if (a.dbias) add_to(total, part, size);
  }
  if (!a.dbias) return;
  for (int64_t m = 0; m < a.rows; ++m) {
    const int64_t at = a.target[m] - begin;
    if (at >= 0 && at < size) total[at] -= hit_of(a);
  }
  add_to(a.dbias + begin, total, size);
}

template <class T>
void fwd(const LinearCrossEntropyFwd& a) {
  row_losses<T>(a);
  if (!a.want_grads) return;
  const int64_t blocks = (a.vocabulary + kBlock - 1) / kBlock;
  parallel_for(blocks, a.threads, [&](int64_t block) {
    const int64_t begin = block * kBlock, size = min_of(kBlock, a.vocabulary - begin);
    column_grads<T>(a, begin, size);
  });
}

}  // namespace

void linear_cross_entropy_fwd(const LinearCrossEntropyFwd& a) {
  by_dtype(a.dtype, [&](auto type) { fwd<decltype(type)>(a); });
}

}  // namespace iv2::IV2_ISA
