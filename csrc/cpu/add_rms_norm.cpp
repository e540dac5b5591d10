// add_rms_norm.cpp - r = residual + drop_scale * layer_scale * x; y = r / rms(r) * weight, and the
// gradients.
//
// One row at a time, rows in parallel; a row (at most some tens of kB) is read from memory once and
// once more from L1. Bound by memory: forward reads x and residual and writes y and r, backward
// reads dy, dr, r (and x) and writes dx and dresidual. dweight and dlayer_scale are sums over rows,
// taken in fixed chunks (kernels.h).
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

template <class X, class R>
void fwd(const AddRmsNormFwd& a) {
  const int64_t dim = a.dim;
  parallel_for(row_chunks(a.rows), a.threads, [&](int64_t chunk) {
    const int64_t chunks = row_chunks(a.rows);
    for (int64_t m = a.rows * chunk / chunks; m < a.rows * (chunk + 1) / chunks; ++m) {
      const X* x = static_cast<const X*>(a.x) + m * dim;
      const R* residual = static_cast<const R*>(a.residual) + m * dim;
      X* y = static_cast<X*>(a.y) + m * dim;
      R* r = static_cast<R*>(a.r) + m * dim;
      const Vec drop = set(a.drop_scale ? a.drop_scale[m / a.rows_per_sample] : 1.0f);
      const float squares = sum_over(dim, [&](int64_t i, int64_t n) {
        Vec branch = load_at(x, i, n);
        if (a.drop_scale) branch = mul(branch, drop);
        if (a.layer_scale) branch = mul(branch, load_at(a.layer_scale, i, n));
        if (a.residual) branch = add(branch, load_at(residual, i, n));
        store_at(r, branch, i, n);
        // y is the norm of r as it is stored, so that backward, which has only the stored r,
        // agrees.
        const Vec stored = load_at(r, i, n);
        return mul(stored, stored);
      });
      const float rstd =
          1.0f / __builtin_sqrtf(squares / static_cast<float>(dim) + static_cast<float>(a.eps));
      a.rstd[m] = rstd;
      for_each_vec(dim, [&](int64_t i, int64_t n) {
        store_at(y, mul(mul(load_at(r, i, n), set(rstd)), load_at(a.weight, i, n)), i, n);
      });
    }
  });
}

template <class X, class R>
void bwd(const AddRmsNormBwd& a) {
  const int64_t dim = a.dim, chunks = row_chunks(a.rows);
  for_row_chunks(a.rows, a.threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dweight = a.scratch + chunk * dim;
    float* dscale = a.scratch + (chunks + chunk) * dim;
    for_each_vec(dim, [&](int64_t i, int64_t n) {
      store_at(dweight, set(0), i, n);
      if (a.dlayer_scale) store_at(dscale, set(0), i, n);
    });
    for (int64_t m = begin; m < end; ++m) {
      const X* dy = static_cast<const X*>(a.dy) + m * dim;
      const X* x = static_cast<const X*>(a.x) + m * dim;
      const R* dr = static_cast<const R*>(a.dr) + m * dim;
      const R* r = static_cast<const R*>(a.r) + m * dim;
      X* dx = static_cast<X*>(a.dx) + m * dim;
      R* dresidual = static_cast<R*>(a.dresidual) + m * dim;
      const Vec drop = set(a.drop_scale ? a.drop_scale[m / a.rows_per_sample] : 1.0f);
      const Vec rstd = set(a.rstd[m]);
      float dot = 0;
      if (a.dy) {
        dot = sum_over(dim, [&](int64_t i, int64_t n) {
          const Vec product = mul(load_at(dy, i, n), mul(load_at(r, i, n), rstd));
          store_at(dweight, add(load_at(dweight, i, n), product), i, n);
          return mul(product, load_at(a.weight, i, n));
        });
      }
      const Vec mean = set(dot / static_cast<float>(dim));
      for_each_vec(dim, [&](int64_t i, int64_t n) {
        Vec total = set(0);
        if (a.dy) {
          const Vec normed = mul(load_at(r, i, n), rstd);
          const Vec scaled = mul(load_at(dy, i, n), load_at(a.weight, i, n));
          total = mul(rstd, sub(scaled, mul(normed, mean)));
        }
        if (a.dr) total = add(total, load_at(dr, i, n));
        if (a.dresidual) store_at(dresidual, total, i, n);
        const Vec dropped = a.drop_scale ? mul(total, drop) : total;
        if (a.dlayer_scale) {
          store_at(dscale, fma(dropped, load_at(x, i, n), load_at(dscale, i, n)), i, n);
        }
        store_at(dx, a.layer_scale ? mul(dropped, load_at(a.layer_scale, i, n)) : dropped, i, n);
      });
    }
  });
  add_chunks(a.scratch, chunks, dim, a.dweight);
  if (a.dlayer_scale) add_chunks(a.scratch + chunks * dim, chunks, dim, a.dlayer_scale);
}

}  // namespace

void add_rms_norm_fwd(const AddRmsNormFwd& a) {
  by_dtype(a.x_dtype,
           [&](auto x) { by_dtype(a.r_dtype, [&](auto r) { fwd<decltype(x), decltype(r)>(a); }); });
}

void add_rms_norm_bwd(const AddRmsNormBwd& a) {
  by_dtype(a.x_dtype,
           [&](auto x) { by_dtype(a.r_dtype, [&](auto r) { bwd<decltype(x), decltype(r)>(a); }); });
}

}  // namespace iv2::IV2_ISA
