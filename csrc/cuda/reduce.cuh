// reduce.cuh - sums over a warp, a block, and the chunks of rows of a launch. Each is a fixed tree:
// a result depends on the shape alone, never on which thread came first.
#pragma once
#include "xp.cuh"

namespace iv2::cuda {
namespace {

constexpr int kMaxWarps = 32;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += shuffle_xor(x, distance);
  return x;
}

// Each x becomes its sum over the block, in every thread; blockDim.x is a multiple of 32. `part` is
// in shared memory, and after one more barrier may be used again: successive calls take turns with
// two.
template <int N>
__device__ __forceinline__ void block_sum(float (&x)[N], float (&part)[N][kMaxWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x[j] = warp_sum(x[j]);
    if (lane == 0) part[j][warp] = x[j];
  }
  sync_block();
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = warp_sum(lane < warps ? part[j][lane] : 0.0f);
}

// out[i] = the sum over chunks of scratch[chunk, i]; blockIdx.y picks one of two such arrays, laid
// end to end in scratch. A block takes 32 columns, its 8 warps every eighth chunk.
constexpr unsigned kColumns = 32, kColumnWarps = 8;
__global__ void __launch_bounds__(kColumns* kColumnWarps)
    sum_chunks_kernel(const float* scratch, int64_t chunks, int64_t dim, float* out0, float* out1) {
  IV2_SHARED(float, part, [kColumnWarps][kColumns]);
  const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int64_t i = int64_t{blockIdx.x} * kColumns + lane;
  const float* column = scratch + blockIdx.y * chunks * dim + i;
  float total = 0;
  if (i < dim) {
    for (int64_t c = warp; c < chunks; c += kColumnWarps) total += read(column + c * dim);
  }
  part[warp][lane] = total;
  sync_block();
  if (warp != 0 || i >= dim) return;
  for (unsigned w = 1; w < kColumnWarps; ++w) total += part[w][lane];
  write((blockIdx.y == 0 ? out0 : out1) + i, total);
}

// out1 may be null.
inline int sum_chunks(const float* scratch, int64_t chunks, int64_t dim, float* out0, float* out1,
                      Stream stream) {
  const dim3 grid(static_cast<unsigned>((dim + kColumns - 1) / kColumns), out1 ? 2 : 1);
  return launch(sum_chunks_kernel, grid, dim3(kColumns * kColumnWarps), 0, stream, scratch, chunks,
                dim, out0, out1);
}

}  // namespace
}  // namespace iv2::cuda
