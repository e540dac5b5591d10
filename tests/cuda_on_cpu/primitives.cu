// primitives.cu - kernels that show what the names of xp.cuh and reduce.cuh do
// (test_primitives.py).
#include "../../csrc/cuda/pack.cuh"
#include "../../csrc/cuda/reduce.cuh"
#include "program.h"

namespace iv2::cuda {
namespace {

struct Args {
  const void* a;
  const void* b;
  void* out;
  int64_t size, dtype;
};

// out[i] = a[i] rounded to T, and packs of it read and written as one word.
template <class T>
__global__ void convert(const Args args) {
  const int64_t i = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (i >= args.size) return;
  const Pack<float, 4> x = load<4>(static_cast<const float*>(args.a) + i);
  store(static_cast<T*>(args.out) + i, from_floats<T>(x.v));
}

// out[i] = a[i] as a float.
template <class T>
__global__ void widen(const Args args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < args.size) {
    write(static_cast<float*>(args.out) + i, to_float(read(static_cast<const T*>(args.a) + i)));
  }
}

// out [16, 8] = a [16, 16] b [16, 8], both row by row in shared memory.
template <class T>
__global__ void multiply(const Args args) {
  IV2_SHARED(uint4, a, [16 * 2]);
  IV2_SHARED(uint4, b, [16]);
  const int lane = threadIdx.x;
  copy_async(a + lane, static_cast<const uint4*>(args.a) + lane, true);
  copy_async(b + lane % 16, static_cast<const uint4*>(args.b) + lane % 16, true);
  copy_async_commit();
  copy_async_wait<0>();
  sync_warp();
  uint32_t left[4], right[4];
  ldmatrix(left, a + lane % 16 * 2 + lane / 16);
  ldmatrix_transposed(right, b + lane % 16);
  float d[4] = {};
  mma<T>(d, left, {right[0], right[1]});
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    write(static_cast<float*>(args.out) + row * 8 + column, d[i]);
  }
}

// Rows of 32: shuffle_up by 3, lane 5's, the lane's bit of a ballot of odd numbers, and where that
// has its first and how many.
__global__ void lanes(const Args args) {
  const int lane = threadIdx.x;
  const int32_t x = read(static_cast<const int32_t*>(args.a) + lane);
  int32_t* out = static_cast<int32_t*>(args.out);
  const unsigned odd = ballot(x % 2 != 0);
  write(out + lane, shuffle_up(x, 3));
  write(out + 32 + lane, shuffle(x, 5));
  write(out + 64 + lane, static_cast<int32_t>(odd >> lane & 1));
  write(out + 96 + lane, lane == 0 ? first_bit(odd) : count_bits(odd));
}

// out[2 blocks] = the sums of a [size] and of its squares, twice.
__global__ void sums(const Args args) {
  IV2_SHARED(float, part, [2][2][kMaxWarps]);
  for (int turn = 0; turn < 2; ++turn) {
    float x[2] = {};
    for (int64_t i = threadIdx.x; i < args.size; i += blockDim.x) {
      const float value = read(static_cast<const float*>(args.a) + i);
      x[0] += value;
      x[1] += value * value;
    }
    block_sum(x, part[turn]);
    // any thread has them
    if (threadIdx.x == blockDim.x - 1) {
      write(static_cast<float*>(args.out) + 2 * turn, x[0]);
      write(static_cast<float*>(args.out) + 2 * turn + 1, x[1]);
    }
  }
}

}  // namespace
}  // namespace iv2::cuda

extern "C" int run_kernel(const char* name, const int64_t* fields, int64_t count) {
  using namespace iv2::cuda;
  (void)count;
  const Args args = {reinterpret_cast<const void*>(fields[0]),
                     reinterpret_cast<const void*>(fields[1]), reinterpret_cast<void*>(fields[2]),
                     fields[3], fields[4]};
  const std::string wanted = name;
  const dim3 blocks(static_cast<unsigned>((args.size + 63) / 64));
  return by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (wanted == "convert") return launch(convert<T>, blocks, dim3(64), 0, nullptr, args);
    if (wanted == "widen") return launch(widen<T>, blocks, dim3(64), 0, nullptr, args);
    if (wanted == "lanes") return launch(lanes, dim3(1), dim3(32), 0, nullptr, args);
    if (wanted == "sums") return launch(sums, dim3(1), dim3(96), 0, nullptr, args);
    if constexpr (sizeof(T) == 2) {
      if (wanted == "multiply") return launch(multiply<T>, dim3(1), dim3(32), 0, nullptr, args);
    }
    shim::last_error = "there is no kernel " + wanted;
    return 1;
  });
}
