// rope3d.cpp - rotary position embedding over a grid of time, rows and columns.
//
// A token's cosines and sines are three short rows of tables, one for each axis, laid side by side
// once and used for all heads; pairs lie half a head apart, so that both halves are whole vectors.
// Backward is the same rotation with the sines negated. Bound by memory: one read, one write.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

struct Angles {
  float cos[kRopePairs], sin[kRopePairs];
};

void place(const Rope3dFwd& a, int64_t id, Angles& angles) {
  const int64_t axes[3][3] = {{id / (a.grid_h * a.grid_w), a.grid_t, a.pairs_t},
                              {id / a.grid_w % a.grid_h, a.grid_h, a.pairs_h},
                              {id % a.grid_w, a.grid_w, a.pairs_w}};
  int64_t table = 0, at = 0;
  for (const auto& [position, size, pairs] : axes) {
    const int64_t row = table + position * pairs;
    memcpy(angles.cos + at, a.cos + row, static_cast<size_t>(pairs) * sizeof(float));
    memcpy(angles.sin + at, a.sin + row, static_cast<size_t>(pairs) * sizeof(float));
    table += size * pairs;
    at += pairs;
  }
}

template <class T>
void rotate(const T* x, T* y, int64_t pairs, const Angles& angles) {
  for_each_vec(pairs, [&](int64_t i, int64_t n) {
    const Vec first = load_at(x, i, n), second = load_at(x + pairs, i, n);
    const Vec cos = load_at(angles.cos, i, n), sin = load_at(angles.sin, i, n);
    store_at(y, sub(mul(first, cos), mul(second, sin)), i, n);
    store_at(y + pairs, fma(second, cos, mul(first, sin)), i, n);
  });
}

template <class T>
void fwd(const Rope3dFwd& a) {
  const int64_t placed = a.tokens - a.first;
  for_row_chunks(a.batch * a.tokens, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    Angles angles;
    for (int64_t m = begin; m < end; ++m) {
      const int64_t b = m / a.tokens, n = m % a.tokens - a.first;
      const T* x = static_cast<const T*>(a.x) + b * a.x_batch + (n + a.first) * a.x_token;
      T* y = static_cast<T*>(a.y) + m * a.heads * a.head_dim;
      if (n >= 0) place(a, a.ids ? a.ids[b * placed + n] : n, angles);
      for (int64_t h = 0; h < a.heads; ++h, x += a.x_head, y += a.head_dim) {
        if (n >= 0)
          rotate(x, y, a.head_dim / 2, angles);
        else
          memcpy(y, x, static_cast<size_t>(a.head_dim) * sizeof(T));
      }
    }
  });
}

}  // namespace

void rope3d_fwd(const Rope3dFwd& a) {
  by_dtype(a.dtype, [&](auto type) { fwd<decltype(type)>(a); });
}

}  // namespace iv2::IV2_ISA
