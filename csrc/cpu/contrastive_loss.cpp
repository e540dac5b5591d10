// contrastive_loss.cpp - symmetric InfoNCE over the logits s = v t^T / temperature, and its
// gradients, from one G = v t^T each.
//
// A tile of G (pair_tiles.h) feeds both directions. Forward: a row's maximum and sum of
// exponentials are found per block of 64 columns and the blocks joined when the strip is done; a
// column's are kept online from strip to strip. Terms equal to the maximum are counted and not
// summed: where the only positive is the maximum, as it is late in training, the loss is
// log(1 + rest) for a rest far below the precision of 1. Backward:
// dloss/ds = (softmax_row + softmax_column - 2 target) dloss / 2B; the target, the same-label
// matrix over its row sums, is symmetric and compared on the fly.
#include "pair_tiles.h"

namespace iv2::IV2_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Rows of PairLossFwd.stats and PairLossBwd.stats.
struct Stats {
  float *row_max, *row_sum, *column_max, *column_sum;
  template <class Args>
  explicit Stats(const Args& a)
      : row_max(a.stats),
        row_sum(a.stats + a.rows),
        column_max(a.stats + 2 * a.rows),
        column_sum(a.stats + 2 * a.rows + a.columns) {}
};

// PairLossFwd.sums.
struct Sums {
  float *positives, *row_ties, *column_ties;
  Sums(float* sums, int64_t rows)
      : positives(sums), row_ties(sums + rows), column_ties(sums + 2 * rows) {}
};

// What a strip's rows got from one block of columns.
struct RowParts {
  float *max, *rest, *ties, *positives;  // [kStrip] each
  RowParts(float* parts, int64_t block)
      : max(parts + block * 4 * kStrip),
        rest(max + kStrip),
        ties(rest + kStrip),
        positives(ties + kStrip) {}
};

// Terms e^(s - highest) of a sum: those of s = highest counted, the rest added up.
struct Terms {
  Vec ties, rest;
  void add_terms(Vec s, Vec highest, int64_t n) {
    ties = add(ties, keep_first(pick_less(s, highest, set(0), set(1)), n));
    const Vec top = mul(s, set(0));  // 0, but NaN stays NaN
    rest = add(rest, keep_first(pick_less(s, highest, exp_or_nan(sub(s, highest)), top), n));
  }
  // The same terms against a maximum that is as high or higher.
  Terms against(Vec before, Vec now) const {
    const Vec shrunk = mul(add(ties, rest), exp_or_nan(sub(before, now)));
    return {pick_less(before, now, set(0), ties), pick_less(before, now, shrunk, rest)};
  }
};

double log_of(float ties, float rest) {
  return __builtin_log(static_cast<double>(ties)) +
         __builtin_log1p(static_cast<double>(rest) / static_cast<double>(ties));
}

// G to logits; their maxima by row, and by column into `column_max`, [kBlock].
void tile_maxima(const PairTile& tile, const Affine& affine, const RowParts& part,
                 float* column_max) {
  for (int64_t j = 0; j < kBlock; ++j) column_max[j] = -kInfinity;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* g = tile.g + r * kBlock;
    Vec highest = set(-kInfinity);
    for (int64_t j = 0; j < tile.columns; j += Vec::size) {
      const Vec s = affine(load(g + j));
      store(g + j, s);
      highest = max(s, highest);
      store(column_max + j, max(s, load(column_max + j)));
    }
    part.max[r] = max_across(highest);
  }
}

// Terms by row, and by column into `column_ties` and `column_rest`, [kBlock]; sums of positives.
void tile_sums(const PairLossFwd& a, const PairTile& tile, const RowParts& part,
               const float* column_max, float* column_ties, float* column_rest) {
  for (int64_t j = 0; j < kBlock; ++j) column_ties[j] = column_rest[j] = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const float* g = tile.g + r * kBlock;
    const Vec highest = set(part.max[r]), label = set(a.labels[tile.row + r]);
    Terms row{set(0), set(0)};
    Vec positives = set(0);
    for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
      const Vec s = load(g + j);
      const Vec other = load_at(a.column_labels + tile.column, j, n);
      row.add_terms(s, highest, n);
      positives = add(positives, keep_first(pick_same(label, other, s, set(0)), n));
      Terms column{load(column_ties + j), load(column_rest + j)};
      column.add_terms(s, load(column_max + j), Vec::size);
      store(column_ties + j, column.ties);
      store(column_rest + j, column.rest);
    });
    part.rest[r] = sum(row.rest);
    part.ties[r] = sum(row.ties);
    part.positives[r] = sum(positives);
  }
}

void tile_stats(const PairLossFwd& a, const PairTile& tile, const RowParts& part) {
  float tile_max[kBlock], tile_ties[kBlock], tile_rest[kBlock];
  tile_maxima(tile, Affine(a), part, tile_max);
  float* column_max = Stats(a).column_max + tile.column;
  float* column_rest = Stats(a).column_sum + tile.column;
  float* column_ties = Sums(a.sums, a.rows).column_ties + tile.column;
  for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
    Terms before{set(0), set(0)};
    if (tile.row > 0) {
      const Vec was = load_at(column_max, j, n), now = max(load(tile_max + j), was);
      before = Terms{load_at(column_ties, j, n), load_at(column_rest, j, n)}.against(was, now);
      store(tile_max + j, now);
    }
    store_at(column_max, load(tile_max + j), j, n);
    store_at(column_ties, before.ties, j, n);
    store_at(column_rest, before.rest, j, n);
  });
  tile_sums(a, tile, part, tile_max, tile_ties, tile_rest);
  for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
    store_at(column_ties, add(load_at(column_ties, j, n), load(tile_ties + j)), j, n);
    store_at(column_rest, add(load_at(column_rest, j, n), load(tile_rest + j)), j, n);
  });
}

// Joins what the rows of a strip got from all blocks.
void join_blocks(const PairLossFwd& a, float* parts, int64_t row, int64_t rows) {
  const Stats stats(a);
  const Sums sums(a.sums, a.rows);
  const int64_t blocks = pair_blocks(a.columns);
  for_each_vec(rows, [&](int64_t r, int64_t n) {
    Vec highest = set(-kInfinity), positives = set(0);
    Terms all{set(0), set(0)};
    for (int64_t b = 0; b < blocks; ++b)
      highest = max(load_at(RowParts(parts, b).max, r, n), highest);
    for (int64_t b = 0; b < blocks; ++b) {
      const RowParts part(parts, b);
      const Terms block = Terms{load_at(part.ties, r, n), load_at(part.rest, r, n)}.against(
          load_at(part.max, r, n), highest);
      all = {add(all.ties, block.ties), add(all.rest, block.rest)};
      positives = add(positives, load_at(part.positives, r, n));
    }
    store_at(stats.row_max + row, highest, r, n);
    store_at(stats.row_sum + row, all.rest, r, n);
    store_at(sums.row_ties + row, all.ties, r, n);
    store_at(sums.positives + row, positives, r, n);
  });
}

template <class T>
void fwd(const PairLossFwd& a) {
  using Words = typename WordsOf<T>::type;
  float* parts = a.strip;
  const PairStrip<Words, T> strip(a, parts);
  for_each_pair_tile(
      a, strip, false, nullptr,
      [&](const PairTile& tile) { tile_stats(a, tile, RowParts(parts, tile.block)); },
      [&](int64_t row, int64_t rows) { join_blocks(a, parts, row, rows); });
  if (!a.loss) return;
  const Stats stats(a);
  const Sums sums(a.sums, a.rows);
  double total = 0;
  for (int64_t i = 0; i < a.rows; ++i) {
    float &row_rest = stats.row_sum[i], &column_rest = stats.column_sum[i];
    const double positive = static_cast<double>(sums.positives[i]) * a.inverse_counts[i];
    total += (stats.row_max[i] - positive) + (stats.column_max[i] - positive) +
             log_of(sums.row_ties[i], row_rest) + log_of(sums.column_ties[i], column_rest);
    row_rest = 1.0f / (sums.row_ties[i] + row_rest);
    column_rest = 1.0f / (sums.column_ties[i] + column_rest);
  }
  *a.loss = static_cast<float>(total / (2.0 * static_cast<double>(a.rows)));
}

// A tile of G to dloss/dG; sums[0] gets the gradient of the scale: the sum of dloss/ds s / scale.
// dloss/ds sums to 0 along a row or a column, so s may count from their maxima, and nothing large
// cancels.
void tile_gradients(const PairLossBwd& a, const Stats& stats, const PairTile& tile, double* sums) {
  const Affine affine(a);
  const double to_s = a.dloss / (2.0 * static_cast<double>(a.rows));
  const Vec to_g = set(static_cast<float>(to_s * a.scale));
  double scale_gradient = 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* g = tile.g + r * kBlock;
    const int64_t i = tile.row + r;
    const Vec row_max = set(stats.row_max[i]), row_inverse = set(stats.row_sum[i]);
    const Vec label = set(a.labels[i]), target = set(a.inverse_counts[i]);
    Vec total = set(0);
    for_each_vec(tile.columns, [&](int64_t j, int64_t n) {
      const int64_t at = tile.column + j;
      const Vec s = affine(load(g + j));
      const Vec by_row = sub(s, row_max), by_column = sub(s, load_at(stats.column_max, at, n));
      const Vec p = mul(exp_or_nan(by_row), row_inverse);
      const Vec q = mul(exp_or_nan(by_column), load_at(stats.column_sum, at, n));
      const Vec same = pick_same(label, load_at(a.column_labels, at, n), target, set(0));
      const Vec dp = sub(p, same), dq = sub(q, same);
      total = add(total, keep_first(fma(dp, by_row, mul(dq, by_column)), n));
      store(g + j, mul(add(dp, dq), to_g));
    });
    scale_gradient += sum(total);
  }
  sums[0] += scale_gradient * to_s / a.scale;
}

}  // namespace

void contrastive_loss_fwd(const PairLossFwd& a) {
  by_dtype(a.dtype, [&](auto type) { fwd<decltype(type)>(a); });
}

void contrastive_loss_bwd(const PairLossBwd& a) {
  const Stats stats(a);
  by_dtype(a.dtype, [&](auto type) {
    pair_gradients<decltype(type)>(
        a, [&](const PairTile& tile, double* sums) { tile_gradients(a, stats, tile, sums); });
  });
}

}  // namespace iv2::IV2_ISA
