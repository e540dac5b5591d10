// distill_loss.cpp - mean over rows of 2 - 2 cos(LayerNorm(x) w + b, target row), and its
// gradients.
//
// A row is read from memory once and then stays in L1: its mean, its variance, seven sums that give
// the cosine and the two means of LayerNorm's backward, and the gradient. Since the loss is a sum
// over rows, dx, dweight and dbias are known before any gradient arrives, up to its factor; they
// are stored times a power of two near rows * dim, which keeps a float16 dx in range, and backward
// scales them. Rows are parallel; the sums over rows are taken in fixed chunks (kernels.h). Bound
// by memory: one read of x and of the target's rows, one write of dx.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

// torch.nn.functional.cosine_similarity's least norm.
constexpr double kLeastNorm = 1e-8;

// Four sums side by side: one alone would wait for each addition.
template <class Term>
inline float sum_of(int64_t dim, Term term) {
  Vec total[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * Vec::size <= dim; i += 4 * Vec::size)
    for (int64_t k = 0; k < 4; ++k) total[k] = add(total[k], term(i + k * Vec::size, Vec::size));
  for (; i < dim; i += Vec::size) total[0] = add(total[0], term(i, min_of(Vec::size, dim - i)));
  return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}

template <class X, class T>
struct Row {
  const X* x;
  const T* target;
  const float *weight, *bias;
  int64_t dim;
  float mean, rstd;

  void measure(float eps) {
    const float count = static_cast<float>(dim);
    mean = sum_of(dim, [&](int64_t i, int64_t n) { return load_at(x, i, n); }) / count;
    const float squares = sum_of(dim, [&](int64_t i, int64_t n) {
      const Vec centred = keep_first(sub(load_at(x, i, n), set(mean)), n);
      return mul(centred, centred);
    });
    rstd = 1.0f / __builtin_sqrtf(squares / count + eps);
  }
  Vec unit(int64_t i, int64_t n) const { return mul(sub(load_at(x, i, n), set(mean)), set(rstd)); }
};

// Sums over a row, with h = unit x and y = w h + b the norm's output.
struct Sums {
  Vec yt, yy, tt, wt, wy, wht, why;
};

template <bool kGrads, class X, class T>
Sums row_sums(const Row<X, T>& row) {
  Sums s = {set(0), set(0), set(0), set(0), set(0), set(0), set(0)};
  for_each_vec(row.dim, [&](int64_t i, int64_t n) {
    // lanes past the end: w, b and t are 0 there, and so is every product
    const Vec w = load_at(row.weight, i, n), t = load_at(row.target, i, n);
    const Vec wh = mul(w, row.unit(i, n)), y = add(wh, load_at(row.bias, i, n));
    s.yt = fma(y, t, s.yt);
    s.yy = fma(y, y, s.yy);
    s.tt = fma(t, t, s.tt);
    if (kGrads) {
      s.wt = fma(w, t, s.wt);
      s.wy = fma(w, y, s.wy);
      s.wht = fma(wh, t, s.wht);
      s.why = fma(wh, y, s.why);
    }
  });
  return s;
}

// The gradient of y is by_t t - by_y y; from there back through the norm.
template <class X, class T>
void row_grads(const Row<X, T>& row, float by_t, float by_y, const Sums& s, X* dx, float* dweight,
               float* dbias) {
  const float count = static_cast<float>(row.dim);
  const Vec mean = set((by_t * sum(s.wt) - by_y * sum(s.wy)) / count);
  const Vec mean_h = set((by_t * sum(s.wht) - by_y * sum(s.why)) / count);
  const Vec minus_y = set(-by_y);
  for_each_vec(row.dim, [&](int64_t i, int64_t n) {
    const Vec h = row.unit(i, n), w = load_at(row.weight, i, n);
    const Vec y = add(mul(w, h), load_at(row.bias, i, n));
    const Vec dy = fma(minus_y, y, mul(set(by_t), load_at(row.target, i, n)));
    if (dweight) {
      store_at(dweight, fma(dy, h, load_at(dweight, i, n)), i, n);
      store_at(dbias, add(dy, load_at(dbias, i, n)), i, n);
    }
    if (dx) {
      const Vec centred = sub(sub(mul(dy, w), mean), mul(h, mean_h));
      store_at(dx, mul(centred, set(row.rstd)), i, n);
    }
  });
}

template <class X, class T>
void fwd(const DistillLossFwd& a) {
  const int64_t dim = a.dim, chunks = row_chunks(a.rows);
  for_row_chunks(a.rows, a.threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dweight = a.dweight ? a.scratch + chunk * dim : nullptr;
    float* dbias = a.dweight ? a.scratch + (chunks + chunk) * dim : nullptr;
    if (a.dweight) {
      for_each_vec(dim, [&](int64_t i, int64_t n) {
        store_at(dweight, set(0), i, n);
        store_at(dbias, set(0), i, n);
      });
    }
    double total = 0;
    for (int64_t m = begin; m < end; ++m) {
      const int64_t sample = m / a.rows_per_sample;
      const int64_t id = a.ids ? a.ids[m] : m % a.rows_per_sample;
      Row<X, T> row = {static_cast<const X*>(a.x) + m * dim,
                       static_cast<const T*>(a.target) + (sample * a.target_rows + id) * dim,
                       a.norm_weight,
                       a.norm_bias,
                       dim,
                       0,
                       0};
      row.measure(static_cast<float>(a.eps));
      const bool grads = a.dx || a.dweight;
      const Sums s = grads ? row_sums<true>(row) : row_sums<false>(row);
      const double length = __builtin_sqrt(sum(s.yy)), least = max_of(length, kLeastNorm);
      const double target_length = max_of(__builtin_sqrt(sum(s.tt)), kLeastNorm);
      const double cosine = sum(s.yt) / (least * target_length);
      total += 2.0 - 2.0 * cosine;
      if (!grads) continue;
      const double factor = -2.0 * a.unit / static_cast<double>(a.rows);
      // the clamp of the length is not differentiated, the length is, as torch does
      const double by_y = length > 0 ? factor * cosine / (least * length) : 0;
      row_grads(row, static_cast<float>(factor / (least * target_length)), static_cast<float>(by_y),
                s, a.dx ? static_cast<X*>(a.dx) + m * dim : nullptr, dweight, dbias);
    }
    a.sums[chunk] = total;
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += a.sums[chunk];
  *a.loss = static_cast<float>(total / static_cast<double>(a.rows));
  if (!a.dweight) return;
  add_chunks(a.scratch, chunks, dim, a.dweight);
  add_chunks(a.scratch + chunks * dim, chunks, dim, a.dbias);
}

}  // namespace

void distill_loss_fwd(const DistillLossFwd& a) {
  by_dtype(a.x_dtype, [&](auto x) {
    by_dtype(a.target_dtype, [&](auto t) { fwd<decltype(x), decltype(t)>(a); });
  });
}

void distill_loss_bwd(const DistillLossBwd& a) {
  by_dtype(a.dtype, [&](auto type) {
    using X = decltype(type);
    const Vec scale = set(static_cast<float>(a.scale));
    for_row_chunks(a.rows, a.threads, [&](int64_t, int64_t begin, int64_t end) {
      const X* unit = static_cast<const X*>(a.dx_unit) + begin * a.dim;
      X* dx = static_cast<X*>(a.dx) + begin * a.dim;
      for_each_vec((end - begin) * a.dim, [&](int64_t i, int64_t n) {
        store_at(dx, mul(load_at(unit, i, n), scale), i, n);
      });
    });
  });
}

}  // namespace iv2::IV2_ISA
