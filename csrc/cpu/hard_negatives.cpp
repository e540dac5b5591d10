// hard_negatives.cpp - for each row of v the column, and for each column the row of v, with the
// largest score + Gumbel noise among those of another class.
//
// Scores come in tiles of 64 rows by 128 columns that stay in cache (gemm.h), and each tile is used
// in both directions: a row keeps its best column over the tiles of its block, a column its best
// row over the rows of a chunk, and chunks are compared in order. The noise is made on the spot
// from Philox words: along the columns with the row's seed, and along the rows, four at a time,
// with the columns' seeds side by side. Chunks of rows are parallel; ties go to the lower index, so
// that no partition shows. Bound by the fp32 multiply for wide features, by the noise (two
// logarithms and a quarter of a Philox block per score and direction) for narrow ones.
#include "../kernels.h"
#include "gemm.h"
#include "philox.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kRows = kHardNegativesRows;
constexpr int64_t kColumns = kHardNegativesColumns;
constexpr float kNever = -__builtin_inff();
static_assert(kColumns == kWords && kRows % 4 == 0, "a row of a tile is one call of philox");

struct Tile {
  int64_t row, rows, column, columns;
  float scores[kRows * kColumns];
};

inline float gumbel(uint64_t word) {
  return minus_log2(minus_log2(uniform_of(static_cast<uint32_t>(word))));
}

void start(uint64_t (&c)[4][kBlocks], int64_t block, int64_t step, int64_t direction,
           int64_t stream) {
  for (int64_t i = 0; i < kBlocks; ++i) {
    c[0][i] = static_cast<uint64_t>(block + i * step);
    c[1][i] = static_cast<uint64_t>(direction);
    c[2][i] = static_cast<uint64_t>(stream);
    c[3][i] = static_cast<uint64_t>(stream) >> 32;
  }
}

// The best column so far of each row of the tile.
void best_columns(const HardNegativesDraw& a, const Tile& tile, float* best, int32_t* column) {
  const float scale = static_cast<float>(a.scale);
  const int32_t* classes = a.classes + tile.column;
  uint64_t c[4][kBlocks];
  float keys[kColumns];
  for (int64_t j = 0; j < kColumns; ++j) keys[j] = kNever;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint64_t seed = static_cast<uint64_t>(a.seeds[tile.row + r]);
    start(c, tile.column / 4, 1, 0, a.stream);
    philox(c, [seed](int64_t) { return seed; });
    float noise[kWords];
    for (int64_t i = 0; i < kBlocks; ++i)
      for (int64_t w = 0; w < 4; ++w) noise[4 * i + w] = gumbel(c[w][i]);
    const int32_t own = a.classes[tile.row + r];
    const float* scores = tile.scores + r * kColumns;
    for (int64_t j = 0; j < tile.columns; ++j) {
      const float key = scores[j] * scale + noise[j];
      keys[j] = classes[j] == own ? kNever : key;
    }
    Vec most = load(keys);
    for (int64_t j = Vec::size; j < kColumns; j += Vec::size) most = max(most, load(keys + j));
    const float largest = max_across(most);
    if (!(largest > best[r])) continue;
    best[r] = largest;
    int64_t j = 0;
    while (j < kColumns - 1 && keys[j] != largest) ++j;
    column[r] = static_cast<int32_t>(tile.column + j);
  }
}

// The best row so far of each column of the tile: four rows, which share a Philox block, and
// kBlocks columns at a time.
void best_rows(const HardNegativesDraw& a, const Tile& tile, float* best, int32_t* row) {
  const float scale = static_cast<float>(a.scale);
  uint64_t c[4][kBlocks], seeds[kBlocks];
  for (int64_t begin = 0; begin < tile.columns; begin += kBlocks) {
    const int64_t n = min_of(kBlocks, tile.columns - begin), first = tile.column + begin;
    for (int64_t i = 0; i < kBlocks; ++i)
      seeds[i] = i < n ? static_cast<uint64_t>(a.seeds[first + i]) : 0;
    for (int64_t r = 0; r < tile.rows; r += 4) {
      start(c, (tile.row + r) / 4, 0, 1, a.stream);
      philox(c, [&seeds](int64_t i) { return seeds[i]; });
      for (int64_t w = 0; w < min_of(int64_t{4}, tile.rows - r); ++w) {
        const int32_t id = static_cast<int32_t>(tile.row + r + w), own = a.classes[id];
        const float* scores = tile.scores + (r + w) * kColumns + begin;
        float keys[kBlocks];
        for (int64_t i = 0; i < kBlocks; ++i) keys[i] = scores[i] * scale + gumbel(c[w][i]);
        for (int64_t i = 0; i < n; ++i) {
          const bool better = keys[i] > best[first + i] && a.classes[first + i] != own;
          best[first + i] = better ? keys[i] : best[first + i];
          row[first + i] = better ? id : row[first + i];
        }
      }
    }
  }
}

void chunk_of_rows(const HardNegativesDraw& a, int64_t chunk) {
  const int64_t blocks = (a.batch + kRows - 1) / kRows;
  float* best = a.best + chunk * a.batch;
  int32_t* row = a.best_row + chunk * a.batch;
  for (int64_t j = 0; j < a.batch; ++j) {
    best[j] = kNever;
    row[j] = -1;
  }
  Tile tile;
  for (int64_t b = blocks * chunk / a.chunks; b < blocks * (chunk + 1) / a.chunks; ++b) {
    tile.row = b * kRows;
    tile.rows = min_of(kRows, a.batch - tile.row);
    float best_in_row[kRows];
    for (int64_t r = 0; r < tile.rows; ++r) {
      best_in_row[r] = kNever;
      a.neg_t[tile.row + r] = -1;
    }
    for (tile.column = 0; tile.column < a.batch; tile.column += kColumns) {
      tile.columns = min_of(kColumns, a.batch - tile.column);
      const Operands operands = {a.v + tile.row * a.dim,
                                 a.dim,
                                 a.t_columns + tile.column * a.dim,
                                 kColumns,
                                 tile.scores,
                                 kColumns,
                                 a.dim};
      multiply<Fp32Words>(operands, tile.rows, kColumns / Vec::size, false);
      best_columns(a, tile, best_in_row, a.neg_t + tile.row);
      best_rows(a, tile, best, row);
    }
  }
}

}  // namespace

void hard_negatives_draw(const HardNegativesDraw& a) {
  parallel_for(a.chunks, a.threads, [&](int64_t chunk) { chunk_of_rows(a, chunk); });
  for (int64_t j = 0; j < a.batch; ++j) {
    float best = kNever;
    a.neg_v[j] = -1;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      if (!(a.best[chunk * a.batch + j] > best)) continue;
      best = a.best[chunk * a.batch + j];
      a.neg_v[j] = a.best_row[chunk * a.batch + j];
    }
  }
}

}  // namespace iv2::IV2_ISA
