// masks.cpp - sorted indices of the num_keep smallest race keys -log2(u) / weight of each row.
//
// A row (a frame of 256 tokens, a clip of 2048) stays in L1: Philox words, keys from the words, the
// num_keep-th smallest key by bisection over the bits of the key (counting passes, no data moves),
// and one pass that writes the kept indices in order. Rows are parallel. Bound by integer
// multiplies. The arithmetic is iv2kernels/ops/masks.py's, operation by operation, and no
// multiply-add is fused: every implementation gives the same indices. The loops are plain, over
// arrays of fixed length, for the compiler to vectorise.
#include "../kernels.h"
#include "philox.h"

namespace iv2::IV2_ISA {
namespace {

constexpr uint32_t kZeroWeight = 1u << 31;  // above the bits of every positive float

// The words of the blocks first_block... of a row, in order.
void random_words(const MasksDraw& a, uint64_t seed, int64_t row, int64_t first_block,
                  uint32_t (&words)[kWords]) {
  uint64_t c[4][kBlocks];
  for (int64_t i = 0; i < kBlocks; ++i) {
    c[0][i] = static_cast<uint64_t>(first_block + i);
    c[1][i] = static_cast<uint64_t>(row);
    c[2][i] = static_cast<uint64_t>(a.stream);
    c[3][i] = static_cast<uint64_t>(a.stream) >> 32;
  }
  philox(c, [seed](int64_t) { return seed; });
  for (int64_t i = 0; i < kBlocks; ++i)
    for (int64_t w = 0; w < 4; ++w) words[4 * i + w] = static_cast<uint32_t>(c[w][i]);
}

// Keys of a row as integers in the order of the floats; false if a weight is negative or not
// finite.
bool race(const MasksDraw& a, uint64_t seed, int64_t row, const float* weights, uint32_t* keys) {
  uint32_t words[kWords], bad = 0;
  float weight[kWords];
  for (int64_t i = 0; i < kWords; ++i) weight[i] = 1.0f;
  for (int64_t begin = 0; begin < a.tokens; begin += kWords) {
    const int64_t n = min_of(kWords, a.tokens - begin);
    random_words(a, seed, row, begin / 4, words);
    if (weights) memcpy(weight, weights + begin, static_cast<size_t>(n) * 4);
    for (int64_t i = 0; i < kWords; ++i) {
      const float time = minus_log2(uniform_of(words[i]));
      const uint32_t positive = bits_of(time / weight[i]), bits = bits_of(weight[i]);
      const uint32_t is_zero = bits << 1 == 0 ? ~0u : 0u;
      words[i] = (positive & ~is_zero) | ((kZeroWeight + bits_of(time)) & is_zero);
      bad |= (bits > 0x7F7FFFFFu ? ~0u : 0u) & ~is_zero;  // a sign, infinity or NaN
    }
    memcpy(keys + begin, words, static_cast<size_t>(n) * 4);
  }
  return bad == 0;
}

int64_t count_up_to(const uint32_t* keys, int64_t n, uint32_t bound) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {  // 32-bit counters fill the registers
    const int64_t end = min_of(begin + 4096, n);
    int32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += keys[i] <= bound ? 1 : 0;
    total += count;
  }
  return total;
}

// A bound with at least `keep` keys up to it, and with fewer than `keep` below it unless exactly
// `keep` are up to it.
uint32_t bound_of(const uint32_t* keys, int64_t n, int64_t keep) {
  uint32_t low = 0, high = 0xFFFFFFFFu;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t count = count_up_to(keys, n, middle);
    if (count == keep) return middle;
    if (count > keep)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

void draw_row(const MasksDraw& a, int64_t sample, int64_t row, uint32_t* keys) {
  const float* weights = a.weights ? a.weights + (sample * a.rows + row) * a.tokens : nullptr;
  if (!race(a, static_cast<uint64_t>(a.seeds[sample]), row, weights, keys)) {
    __atomic_store_n(a.bad, int64_t{1}, __ATOMIC_RELAXED);
    return;
  }
  if (a.keep == 0) return;
  const uint32_t bound = bound_of(keys, a.tokens, a.keep);
  int64_t ties = bound == 0 ? a.keep : a.keep - count_up_to(keys, a.tokens, bound - 1);
  int32_t* out = a.ids + (sample * a.rows * a.repeat + row) * a.keep;
  int64_t kept = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    if (keys[i] < bound || (keys[i] == bound && ties-- > 0)) {
      out[kept++] = static_cast<int32_t>(row * a.tokens + i);
    }
  }
  for (int64_t frame = 1; frame < a.repeat; ++frame)
    for (int64_t i = 0; i < a.keep; ++i)
      out[frame * a.keep + i] = out[i] + static_cast<int32_t>(frame * a.tokens);
}

}  // namespace

void masks_draw(const MasksDraw& a) {
  parallel_for(a.batch * a.rows, a.threads, [&](int64_t task) {
    draw_row(a, task / a.rows, task % a.rows, a.keys + task * a.tokens);
  });
}

}  // namespace iv2::IV2_ISA
