// siglip_loss.cpp - the pairwise sigmoid loss over the logits s = scale v t^T + bias, and its
// gradients, from one G = v t^T each (pair_tiles.h).
//
// With y = -s for a pair of equal labels and s for any other the loss is the sum of
// softplus(y) = max(y, 0) + log(1 + e^-|y|): pairs do not know of each other, and the walk over
// tiles is all there is. Most pairs are negatives far from the threshold, whose softplus is about
// e^y: the logarithm is accurate for small arguments.
#include "pair_tiles.h"

namespace iv2::IV2_ISA {
namespace {

// log(1 + u) for u in [0, 1]: 2 atanh(w), w = u / (2 + u) up to 1/3, by its series.
inline Vec log_1_plus(Vec u) {
  const Vec w = div(u, add(u, set(2))), ww = mul(w, w);
  Vec p = set(2.0f / 17);
  p = fma(p, ww, set(2.0f / 15));
  p = fma(p, ww, set(2.0f / 13));
  p = fma(p, ww, set(2.0f / 11));
  p = fma(p, ww, set(2.0f / 9));
  p = fma(p, ww, set(2.0f / 7));
  p = fma(p, ww, set(2.0f / 5));
  p = fma(p, ww, set(2.0f / 3));
  return fma(mul(p, ww), w, add(w, w));
}

// e^-|y|; the order of max's operands keeps NaN.
inline Vec exp_minus_magnitude(Vec y) { return exp_or_nan(sub(set(0), max(sub(set(0), y), y))); }

double tile_loss(const PairLossFwd& a, const PairTile& tile) {
  const Affine affine(a);
  double total = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* g = tile.g + r * kBlock;
    const Vec label = set(a.labels[tile.row + r]);
    Vec row = set(0);
    for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
      const Vec other = load_at(a.column_labels + tile.column, j, n);
      const Vec y = mul(pick_same(label, other, set(-1), set(1)), affine(load(g + j)));
      const Vec softplus = add(max(set(0), y), log_1_plus(exp_minus_magnitude(y)));
      row = add(row, keep_first(softplus, n));
    });
    total += sum(row);
  }
  return total;
}

template <class T>
void fwd(const PairLossFwd& a) {
  using Words = typename WordsOf<T>::type;
  float* scratch = a.strip;
  const PairStrip<Words, T> strip(a, scratch);
  const int64_t blocks = pair_blocks(a.columns);
  for (int64_t block = 0; block < blocks; ++block) a.block_sums[block] = 0;
  for_each_pair_tile(
      a, strip, false, nullptr,
      [&](const PairTile& tile) { a.block_sums[tile.block] += tile_loss(a, tile); },
      [](int64_t, int64_t) {});
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += a.block_sums[block];
  *a.loss = static_cast<float>(total / static_cast<double>(a.rows));
}

// A tile of G to dloss/dG; sums get the gradients of the scale and of the bias.
void tile_gradients(const PairLossBwd& a, const PairTile& tile, double* sums) {
  const Affine affine(a);
  const double to_s = a.dloss / static_cast<double>(a.rows);
  const Vec to_g = set(static_cast<float>(to_s * a.scale));
  double scale_gradient = 0, bias_gradient = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* g = tile.g + r * kBlock;
    const Vec label = set(a.labels[tile.row + r]);
    Vec by_g = set(0), plain = set(0);
    for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
      const Vec x = load(g + j), other = load_at(a.column_labels + tile.column, j, n);
      const Vec sign = pick_same(label, other, set(-1), set(1)), y = mul(sign, affine(x));
      const Vec u = exp_minus_magnitude(y);
      const Vec sigmoid = div(pick_less(y, set(0), u, set(1)), add(u, set(1)));
      const Vec ds = keep_first(mul(sign, sigmoid), n);
      by_g = fma(ds, x, by_g);
      plain = add(plain, ds);
      store(g + j, mul(ds, to_g));
    });
    scale_gradient += sum(by_g);
    bias_gradient += sum(plain);
  }
  sums[0] += scale_gradient * to_s;
  sums[1] += bias_gradient * to_s;
}

}  // namespace

void siglip_loss_fwd(const PairLossFwd& a) {
  by_dtype(a.dtype, [&](auto type) { fwd<decltype(type)>(a); });
}

void siglip_loss_bwd(const PairLossBwd& a) {
  by_dtype(a.dtype, [&](auto type) {
    pair_gradients<decltype(type)>(
        a, [&](const PairTile& tile, double* sums) { tile_gradients(a, tile, sums); });
  });
}

}  // namespace iv2::IV2_ISA
