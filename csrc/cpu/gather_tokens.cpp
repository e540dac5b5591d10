// gather_tokens.cpp - rows of x by index, with an optional sum, and the scatter-add that is its
// gradient.
//
// Forward copies a row per index. Backward first sorts the indices by counting, serially (they are
// few: one word per row of dy), and then writes every row of dx once, in parallel, as the sum of
// its rows of dy in order: no atomics, no zeroing pass, duplicates allowed, the same bits for any
// number of threads. Both are bound by memory.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

template <class X, class Y>
void fwd(const GatherTokensFwd& a) {
  for_row_chunks(a.batch * a.keep, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const X* x =
          static_cast<const X*>(a.x) + m / a.keep * a.x_batch + int64_t{a.ids[m]} * a.x_token;
      const Y* other = static_cast<const Y*>(a.add) + m * a.dim;
      Y* y = static_cast<Y*>(a.y) + m * a.dim;
      if (a.add == nullptr && a.x_dtype == a.y_dtype) {
        memcpy(y, x, static_cast<size_t>(a.dim) * sizeof(Y));
        continue;
      }
      for_each_vec(a.dim, [&](int64_t i, int64_t n) {
        const Vec row = load_at(x, i, n);
        store_at(y, a.add ? add(row, load_at(other, i, n)) : row, i, n);
      });
    }
  });
}

// order[starts[r] .. starts[r + 1]) are the rows of dy that belong to row r of dx, in order.
void sort_by_row(const GatherTokensBwd& a) {
  const int64_t rows = a.x_batch * a.tokens, count = a.batch * a.keep;
  const auto row_of = [&](int64_t m) {
    return (a.x_batch == 1 ? 0 : m / a.keep * a.tokens) + a.ids[m];
  };
  memset(a.starts, 0, static_cast<size_t>(rows + 2) * 4);
  for (int64_t m = 0; m < count; ++m) ++a.starts[row_of(m) + 2];
  for (int64_t r = 0; r < rows; ++r) a.starts[r + 2] += a.starts[r + 1];
  // starts[r + 1] is now where row r begins, and after this loop where it ends
  for (int64_t m = 0; m < count; ++m) a.order[a.starts[row_of(m) + 1]++] = static_cast<int32_t>(m);
}

template <class DY, class DX>
void bwd(const GatherTokensBwd& a) {
  sort_by_row(a);
  const auto dy_row = [&](int32_t m) {
    return static_cast<const DY*>(a.dy) + m / a.keep * a.dy_batch + m % a.keep * a.dim;
  };
  for_row_chunks(a.x_batch * a.tokens, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t from = a.starts[r], to = a.starts[r + 1];
      DX* dx = static_cast<DX*>(a.dx) + r * a.dim;
      if (from == to) {
        memset(dx, 0, static_cast<size_t>(a.dim) * sizeof(DX));
        continue;
      }
      for_each_vec(a.dim, [&](int64_t i, int64_t n) {
        Vec total = load_at(dy_row(a.order[from]), i, n);
        for (int32_t k = from + 1; k < to; ++k) {
          total = add(total, load_at(dy_row(a.order[k]), i, n));
        }
        store_at(dx, total, i, n);
      });
    }
  });
}

}  // namespace

void gather_tokens_fwd(const GatherTokensFwd& a) {
  by_dtype(a.x_dtype,
           [&](auto x) { by_dtype(a.y_dtype, [&](auto y) { fwd<decltype(x), decltype(y)>(a); }); });
}

void gather_tokens_bwd(const GatherTokensBwd& a) {
  by_dtype(a.dy_dtype, [&](auto dy) {
    by_dtype(a.dx_dtype, [&](auto dx) { bwd<decltype(dy), decltype(dx)>(a); });
  });
}

}  // namespace iv2::IV2_ISA
