// faults.cu - small kernels for the tests of the net itself (test_net.py). With `fault` set each
// has the mistake that its comment names; without, none.
#include "../../csrc/cuda/pack.cuh"
#include "program.h"

namespace iv2::cuda {
namespace {

struct Args {
  const float* x;
  float* y;
  int64_t size, fault;
};
constexpr int kThreads = 64;

// Reads one element too many.
__global__ void __launch_bounds__(kThreads) beyond_the_end(const Args a) {
  for (int64_t i = threadIdx.x; i < a.size; i += blockDim.x) {
    write(a.y + i, 2 * read(a.x + i + a.fault));
  }
}

// Writes one element too many of shared memory.
__global__ void __launch_bounds__(kThreads) beyond_shared(const Args a) {
  IV2_SHARED(float, part, [kThreads]);
  float* mine = part + threadIdx.x;
  mine[a.fault] = read(a.x + threadIdx.x);
  sync_block();
  write(a.y + threadIdx.x, *mine + 1);
}

// Has no barrier between a thread's write and another's read.
__global__ void __launch_bounds__(kThreads) no_barrier(const Args a) {
  IV2_SHARED(float, part, [kThreads]);
  part[threadIdx.x] = read(a.x + threadIdx.x);
  if (a.fault == 0) sync_block();
  write(a.y + threadIdx.x, part[kThreads - 1 - threadIdx.x]);
}

// Has none between a read and the other's next write: if threads come in order, the result is
// right.
__global__ void __launch_bounds__(kThreads) no_second_barrier(const Args a) {
  IV2_SHARED(float, part, [kThreads]);
  part[threadIdx.x] = read(a.x + threadIdx.x);
  sync_block();
  const float right = threadIdx.x + 1 < kThreads ? part[threadIdx.x + 1] : 0;
  if (a.fault == 0) sync_block();
  part[threadIdx.x] = right;
  write(a.y + threadIdx.x, part[threadIdx.x]);
}

// Lets lanes exchange through shared memory with no sync_warp.
__global__ void __launch_bounds__(32) no_warp_barrier(const Args a) {
  IV2_SHARED(float, part, [32]);
  part[threadIdx.x] = read(a.x + threadIdx.x);
  const float other = shuffle_xor(part[threadIdx.x], 1);  // exchanges, but orders no memory
  if (a.fault == 0) sync_warp();
  write(a.y + threadIdx.x, part[threadIdx.x ^ 1] + 0 * other);
}

// Waits for one group of copies too few.
__global__ void __launch_bounds__(kThreads) no_wait(const Args a) {
  IV2_SHARED_DYNAMIC(float, tile);
  copy_async(tile + 4 * threadIdx.x, a.x + 4 * threadIdx.x, true);
  copy_async_commit();
  if (a.fault == 0) {
    copy_async_wait<0>();
  } else {
    copy_async_wait<1>();
  }
  sync_block();
  for (int j = 0; j < 4; ++j) write(a.y + 4 * threadIdx.x + j, tile[4 * threadIdx.x + j]);
  copy_async_wait<0>();
}

// Adds into one sum from every block.
__global__ void __launch_bounds__(32) racing_blocks(const Args a) {
  if (threadIdx.x != 0) return;
  float* sum = a.y + (a.fault ? 0 : blockIdx.x);
  write(sum, read(sum) + read(a.x + blockIdx.x));
}

// Half of the threads come to a barrier.
__global__ void __launch_bounds__(kThreads) divergent_barrier(const Args a) {
  if (a.fault == 0 || threadIdx.x < 32) sync_block();
  write(a.y + threadIdx.x, read(a.x + threadIdx.x));
}

// Sums an array that it fills in part.
__global__ void __launch_bounds__(kThreads) unset_shared(const Args a) {
  IV2_SHARED(float, part, [kThreads]);
  if (a.fault == 0 || threadIdx.x < 60) part[threadIdx.x] = read(a.x + threadIdx.x);
  sync_block();
  write(a.y + threadIdx.x, part[63 - threadIdx.x]);
}

// Reads 16 bytes at an odd place.
__global__ void __launch_bounds__(32) unaligned_word(const Args a) {
  store(a.y + 4 * threadIdx.x, load<4>(a.x + 4 * threadIdx.x + a.fault));
}

// Reads columns: each lane another sector.
__global__ void __launch_bounds__(32) column_reads(const Args a) {
  for (int i = 0; i < 32; ++i) {
    const int64_t at = a.fault ? threadIdx.x * 32 + i : i * 32 + threadIdx.x;
    write(a.y + i * 32 + threadIdx.x, read(a.x + at));
  }
}

// Transposes through a tile whose rows are all in the same banks.
__global__ void __launch_bounds__(32) bank_conflicts(const Args a) {
  IV2_SHARED(float, tile, [32 * 33]);
  const int pitch = a.fault ? 32 : 33, lane = threadIdx.x;
  for (int i = 0; i < 32; ++i) write_shared(tile + i * pitch + lane, read(a.x + i * 32 + lane));
  sync_warp();
  for (int i = 0; i < 32; ++i) write(a.y + i * 32 + lane, read_shared(tile + lane * pitch + i));
}

}  // namespace
}  // namespace iv2::cuda

extern "C" int run_kernel(const char* name, const int64_t* fields, int64_t count) {
  using namespace iv2::cuda;
  (void)count;
  const Args args = {reinterpret_cast<const float*>(fields[0]), reinterpret_cast<float*>(fields[1]),
                     fields[2], fields[3]};
  const std::string wanted = name;
#define RUN(kernel, blocks, threads, shared) \
  if (wanted == #kernel) return launch(kernel, dim3(blocks), dim3(threads), shared, nullptr, args);
  RUN(beyond_the_end, 1, kThreads, 0)
  RUN(beyond_shared, 1, kThreads, 0)
  RUN(no_barrier, 1, kThreads, 0)
  RUN(no_second_barrier, 1, kThreads, 0)
  RUN(no_warp_barrier, 1, 32, 0)
  RUN(no_wait, 1, kThreads, 16 * kThreads)
  RUN(racing_blocks, 3, 32, 0)
  RUN(divergent_barrier, 1, kThreads, 0)
  RUN(unset_shared, 1, kThreads, 0)
  RUN(unaligned_word, 1, 32, 0)
  RUN(column_reads, 1, 32, 0)
  RUN(bank_conflicts, 1, 32, 0)
#undef RUN
  shim::last_error = "there is no kernel " + wanted;
  return 1;
}
