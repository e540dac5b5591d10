// pair_tiles.h - what losses over all pairs of a row of v and a row of t share: the walk over
// tiles of G = v t^T, forward and backward, without the matrix.
//
// v is taken in strips of 256 rows, t in blocks of 64. Blocks are parallel within a strip and
// strips follow each other, so everything that belongs to a column (its statistics, its row of dt)
// is written by one task at a time and in a fixed order. In backward the tiles of a strip hold
// dloss/dG, and rows of dv are summed from them afterwards, in parallel over 64 rows and 128
// columns. G is multiplied in the words of the dtype, the gradients in fp32: products of dloss/dG
// cancel, and would not when rounded to bf16. Bound by the multipliers.
#pragma once
#include "../kernels.h"
#include "gemm.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kStrip = kPairStrip, kBlock = kPairBlock, kPanel = kPairPanel;

// The pairs of a tile: rows [row, row + rows) of v with rows [column, column + columns) of t.
struct PairTile {
  float* g;  // [rows, kBlock]
  int64_t row, rows, column, columns, block;
};

// scale * g + bias, with the scale in two parts.
struct Affine {
  Vec high, low, bias;
  template <class Args>
  explicit Affine(const Args& a)
      : high(set(static_cast<float>(a.scale))),
        low(set(static_cast<float>(a.scale - static_cast<float>(a.scale)))),
        bias(set(static_cast<float>(a.bias))) {}
  Vec operator()(Vec g) const { return fma(g, low, fma(g, high, bias)); }
};

// vec.h's e^x, but NaN stays NaN.
inline Vec exp_or_nan(Vec x) { return fma(x, set(0), exp(x)); }

// Lane by lane: yes where two labels, whole numbers, are equal, else no.
inline Vec pick_same(Vec label, Vec other, Vec yes, Vec no) {
  const Vec apart = sub(label, other);
  return pick_less(mul(apart, apart), set(0.5f), yes, no);
}

inline float* take_floats(float*& p, int64_t floats) {
  float* taken = p;
  p += floats;
  return taken;
}

// Strides in floats. Rows of 2 KiB would fall on few cache sets.
inline int64_t row_stride(int64_t dim) { return round_up(dim, 16) + 16; }
inline int64_t grad_stride(int64_t dim) { return round_up(dim, 16); }

// Rows of v of a strip as an operand A of G and, in fp32, as an operand B of dt.
template <class Words, class T>
struct PairStrip {
  float *words, *floats;
  int64_t ld;

  template <class Args>
  PairStrip(const Args& a, float*& scratch) : ld(row_stride(a.dim)) {
    words = take_floats(scratch, kStrip * ld);
    floats = words;
    if (Words::per_word > 1) floats = take_floats(scratch, kStrip * ld);
  }
  template <class Args>
  void pack(const Args& a, int64_t row, int64_t rows, bool backward) const {
    const T* v = static_cast<const T*>(a.v) + row * a.dim;
    parallel_for((rows + kBlock - 1) / kBlock, a.threads, [&](int64_t task) {
      const int64_t at = task * kBlock, n = min_of(kBlock, rows - at);
      pack_rows<Words, T>(v + at * a.dim, a.dim, n, n, a.dim, nullptr, nullptr, words + at * ld,
                          ld);
      if (Words::per_word > 1 && backward)
        pack_rows<Fp32Words, T>(v + at * a.dim, a.dim, n, n, a.dim, nullptr, nullptr,
                                floats + at * ld, ld);
    });
  }
};

// One tile of G. Columns from tile.columns to a whole vector repeat the last one.
template <class Words, class T, class Args>
void multiply_pairs(const Args& a, const PairStrip<Words, T>& strip, const PairTile& tile) {
  float* scratch = a.tiles + thread_index() * pair_tile_scratch(a.dim);
  float* packed = take_floats(scratch, kBlock * strip.ld);
  float* t_t = take_floats(scratch, kBlock * strip.ld);
  const int64_t depth = words<Words>(a.dim), padded = round_up(tile.columns, 16);
  pack_rows<Words, T>(static_cast<const T*>(a.t) + tile.column * a.dim, a.dim, tile.columns,
                      tile.columns, a.dim, nullptr, nullptr, packed, strip.ld);
  const float* last = packed + (tile.columns - 1) * strip.ld;
  for (int64_t r = tile.columns; r < padded; ++r)
    memcpy(packed + r * strip.ld, last, static_cast<size_t>(strip.ld) * 4);
  transpose_words(packed, strip.ld, padded, depth, t_t, kBlock);
  multiply<Words>({strip.words, strip.ld, t_t, kBlock, tile.g, kBlock, depth}, tile.rows,
                  padded / Vec::size, false);
}

// body(tile) for every tile of G, which may be overwritten; after_strip(row, rows) when all tiles
// of a strip are done. Tile of block b lies at `tiles` + b * tile_step.
template <class Words, class T, class Args, class Body, class AfterStrip>
void for_each_pair_tile(const Args& a, const PairStrip<Words, T>& strip, bool backward, float* g,
                        Body body, AfterStrip after_strip) {
  for (int64_t row = 0; row < a.rows; row += kStrip) {
    const int64_t rows = min_of(kStrip, a.rows - row);
    strip.pack(a, row, rows, backward);
    parallel_for(pair_blocks(a.columns), a.threads, [&](int64_t block) {
      const int64_t column = block * kBlock, columns = min_of(kBlock, a.columns - column);
      float* own = a.tiles + (thread_index() + 1) * pair_tile_scratch(a.dim) - kStrip * kBlock;
      const PairTile tile{g ? g + block * kStrip * kBlock : own, row, rows, column, columns, block};
      multiply_pairs(a, strip, tile);
      body(tile);
    });
    after_strip(row, rows);
  }
}

// dv of a strip from its tiles.
template <class T>
void sum_row_gradients(const PairLossBwd& a, const float* g, int64_t row, int64_t rows) {
  const int64_t ld = grad_stride(a.dim), panels = (a.dim + kPanel - 1) / kPanel;
  parallel_for((rows + kBlock - 1) / kBlock * panels, a.threads, [&](int64_t task) {
    const int64_t at = task / panels * kBlock, first = task % panels * kPanel;
    const int64_t n = min_of(kBlock, rows - at), width = min_of(kPanel, a.dim - first);
    float* panel = a.tiles + thread_index() * pair_tile_scratch(a.dim);
    for (int64_t block = 0; block < pair_blocks(a.columns); ++block) {
      const int64_t column = block * kBlock, columns = min_of(kBlock, a.columns - column);
      pack_rows<Fp32Words, T>(static_cast<const T*>(a.t) + column * a.dim + first, a.dim, columns,
                              columns, width, nullptr, nullptr, panel, kPanel + 16);
      multiply<Fp32Words>({g + block * kStrip * kBlock + at * kBlock, kBlock, panel, kPanel + 16,
                           a.dv + (row + at) * ld + first, ld, columns},
                          n, (width + Vec::size - 1) / Vec::size, block > 0);
    }
  });
}

// Backward of a loss: gradients(tile, sums) turns a tile of G into dloss/dG and adds the tile's
// share of the loss's two scalar gradients to sums.
template <class T, class Gradients>
void pair_gradients(const PairLossBwd& a, Gradients gradients) {
  using Words = typename WordsOf<T>::type;
  float* scratch = a.strip;
  const PairStrip<Words, T> strip(a, scratch);
  const int64_t ld = grad_stride(a.dim), blocks = pair_blocks(a.columns);
  for (int64_t i = 0; i < 2 * blocks; ++i) a.block_sums[i] = 0;
  for_each_pair_tile(
      a, strip, a.dt != nullptr, scratch,
      [&](const PairTile& tile) {
        gradients(tile, a.block_sums + 2 * tile.block);
        if (!a.dt) return;
        multiply<Fp32Words, true>(
            {tile.g, kBlock, strip.floats, strip.ld, a.dt + tile.column * ld, ld, tile.rows},
            tile.columns, (a.dim + Vec::size - 1) / Vec::size, tile.row > 0);
      },
      [&](int64_t row, int64_t rows) {
        if (a.dv) sum_row_gradients<T>(a, scratch, row, rows);
      });
  a.sums[0] = a.sums[1] = 0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < 2; ++i) a.sums[i] += a.block_sums[2 * block + i];
}

}  // namespace
}  // namespace iv2::IV2_ISA
