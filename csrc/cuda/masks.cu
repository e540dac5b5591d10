// masks.cu - sorted indices of the num_keep smallest race keys -log2(u) / weight of each row.
//
// A block takes a row, in one launch and with no look at a value: Philox words and keys from them,
// the num_keep-th smallest key by its bytes from the highest (four histograms in shared memory, of
// whole numbers, whose order does not matter), and one pass that writes the kept indices in order,
// their places from sums over the lanes and warps before. A thread holds the same tokens in each
// pass, four in a row, and its keys go through the scratch, which stays in L1 and L2. Bound by
// latency: a row of 2048 tokens has two rounds of 256 threads in each of seven passes. A weight
// that is negative or not finite makes all of its row's indices -1.
#include "philox.cuh"

namespace iv2::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kEach = 4, kRound = kThreads * kEach;
constexpr int kBins = 256;
static_assert(kBins == kThreads);
constexpr uint32_t kZeroWeight = 1u << 31;  // above the bits of every positive float

// The key of a token as an integer in the order of the floats; sets bad where the weight is.
__device__ __forceinline__ uint32_t race_key(uint32_t word, float weight, bool* bad) {
  const float time = minus_log2(uniform_of(word));
  const uint32_t bits = bits_of(weight);
  if (bits << 1 == 0) return kZeroWeight + bits_of(time);
  *bad = *bad || bits > 0x7F7FFFFFu;  // a sign, infinity or NaN
  return bits_of(div_rn(time, weight));
}

// Sums over the threads before this one in the block, and over all.
struct Sums {
  int32_t before, total;
};
__device__ __forceinline__ Sums sum_before(int32_t x, int32_t (&part)[kWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t up_to = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = shuffle_up(up_to, distance);
    if (lane >= distance) up_to += other;
  }
  sync_block();  // part may still be read
  if (lane == 31) part[warp] = up_to;
  sync_block();
  Sums sums = {up_to - x, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sums.before += part[w];
    sums.total += part[w];
  }
  return sums;
}

struct Bound {
  uint32_t key;   // the keep-th smallest of a row
  int32_t equal;  // how many of those equal to it are kept
};
// One byte at a time: among the keys that agree with the bytes found so far, the byte at which
// their number reaches what is still to keep.
__device__ __forceinline__ Bound find_bound(const uint32_t* keys, int64_t tokens, int32_t keep,
                                            int32_t (&part)[kWarps], int32_t (&bins)[kBins],
                                            Bound* found) {
  Bound bound = {0, keep};
  uint32_t known = 0;  // the bits that are
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    bins[threadIdx.x] = 0;
    sync_block();
    for (int64_t first = threadIdx.x * kEach; first < tokens; first += kRound) {
      for (int64_t i = first; i < tokens && i < first + kEach; ++i) {
        const uint32_t key = read(keys + i);
        if ((key & known) == bound.key) add_atomically(&bins[key >> shift & 0xFF], 1);
      }
    }
    sync_block();
    const int32_t mine = bins[threadIdx.x];
    const Sums sums = sum_before(mine, part);
    if (sums.before < bound.equal && bound.equal <= sums.before + mine) {
      *found = {bound.key | threadIdx.x << shift, bound.equal - sums.before};
    }
    sync_block();
    bound = *found;
    known |= 0xFFu << shift;
  }
  return bound;
}

// Four blocks a multiprocessor: for a fifth the assembler would spill.
__global__ void __launch_bounds__(kThreads, 4) draw_kernel(const MasksDraw a) {
  IV2_SHARED(int32_t, part, [kWarps]);
  IV2_SHARED(int32_t, bins, [kBins]);
  IV2_SHARED(Bound, found, [1]);
  const int64_t sample = blockIdx.x / a.rows, row = blockIdx.x % a.rows;
  const uint64_t seed = static_cast<uint64_t>(read_cached(a.seeds + sample));
  const uint64_t stream = static_cast<uint64_t>(a.stream);
  const float* weights = a.weights ? a.weights + blockIdx.x * a.tokens : nullptr;
  uint32_t* keys = a.keys + blockIdx.x * a.tokens;
  int32_t* out = a.ids + (sample * a.rows * a.repeat + row) * a.keep;
  bool bad = false;
  for (int64_t first = threadIdx.x * kEach; first < a.tokens; first += kRound) {
    const PhiloxBlock block =
        philox(seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(row),
               static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32));
    for (int j = 0; j < kEach && first + j < a.tokens; ++j) {
      const float weight = weights ? read(weights + first + j) : 1.0f;
      write(keys + first + j, race_key(block.words[j], weight, &bad));
    }
  }
  const bool any_bad = sum_before(bad ? 1 : 0, part).total > 0;
  if (any_bad) {
    for (int64_t i = threadIdx.x; i < a.keep * a.repeat; i += kThreads) write(out + i, -1);
    return;
  }
  if (a.keep == 0) return;
  const Bound bound = find_bound(keys, a.tokens, static_cast<int32_t>(a.keep), part, bins, found);

  // Kept so far: the keys below the bound, and those equal to it as long as `equal` lasts.
  int32_t below = 0, equal = 0;
  for (int64_t begin = 0; begin < a.tokens; begin += kRound) {
    const int64_t first = begin + threadIdx.x * kEach;
    uint32_t mine[kEach];
    int32_t my_below = 0, my_equal = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      mine[j] = first + j < a.tokens ? read(keys + first + j) : 0xFFFFFFFFu;
      my_below += mine[j] < bound.key ? 1 : 0;
      my_equal += mine[j] == bound.key ? 1 : 0;
    }
    // both numbers of a round fit 16 bits
    const Sums sums = sum_before(my_below | my_equal << 16, part);
    int32_t at_below = below + (sums.before & 0xFFFF), at_equal = equal + (sums.before >> 16);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const bool is_equal = mine[j] == bound.key;
      if (mine[j] < bound.key || (is_equal && at_equal < bound.equal)) {
        const int64_t place = at_below + (at_equal < bound.equal ? at_equal : bound.equal);
        for (int64_t frame = 0; frame < a.repeat; ++frame) {
          write(out + frame * a.keep + place,
                static_cast<int32_t>((row + frame) * a.tokens + first + j));
        }
      }
      at_below += mine[j] < bound.key ? 1 : 0;
      at_equal += is_equal ? 1 : 0;
    }
    below += sums.total & 0xFFFF;
    equal += sums.total >> 16;
  }
}

}  // namespace

int masks_draw(const MasksDraw& a, Stream stream) {
  return launch(draw_kernel, dim3(static_cast<unsigned>(a.batch * a.rows)), dim3(kThreads), 0,
                stream, a);
}

}  // namespace iv2::cuda
