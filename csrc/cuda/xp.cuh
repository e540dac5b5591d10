// xp.cuh - the machine as a kernel sees it. Kernels use no intrinsic, no PTX and no CUDA header but
// through this file, so that one source has two builds: nvcc's, below, and that of any C++
// compiler, for which tests/cuda_on_cpu/on_cpu.h gives every name here a twin that runs on the CPU.
//
// Global memory is read by `read` (streamed once), by `read_cached` (small operands that all rows
// share: L1 and L2 hold them) and written by `write`; the twins count what these move. Shared
// memory is declared by IV2_SHARED and IV2_SHARED_DYNAMIC and used as plain arrays.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"

namespace iv2::cuda {

using Stream = void*;  // a cudaStream_t

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace iv2::cuda

#if !defined(__CUDACC__)
#include "on_cpu.h"
#else

#include <cuda_runtime.h>

// An array in shared memory: IV2_SHARED(float, part, [2][32]).
#define IV2_SHARED(T, name, extents) __shared__ T name extents
// The shared memory whose size the launch gives, as T[].
#define IV2_SHARED_DYNAMIC(T, name)                         \
  extern __shared__ __align__(128) unsigned char dynamic[]; \
  T* name = reinterpret_cast<T*>(dynamic)

namespace iv2::cuda {

// Words that an aligned Pack moves as; the twins' may alias any type.
using Word1 = uint8_t;
using Word2 = uint16_t;
using Word4 = uint32_t;
using Word8 = uint2;
using Word16 = uint4;

template <class T>
__device__ __forceinline__ T read(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ T read_cached(const T* p) {
  return __ldg(p);
}
template <class T>
__device__ __forceinline__ void write(T* p, T value) {
  *p = value;
}
// Shared memory, where its banks are to be watched; plain access means the same.
template <class T>
__device__ __forceinline__ T read_shared(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void write_shared(T* p, T value) {
  *p = value;
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
// Orders the memory of the lanes, which shuffles do not.
__device__ __forceinline__ void sync_warp(unsigned lanes = kAllLanes) { __syncwarp(lanes); }

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int lanes) {  // its own in the first `lanes` lanes
  return __shfl_up_sync(kAllLanes, value, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
__device__ __forceinline__ unsigned ballot(bool yes) { return __ballot_sync(kAllLanes, yes); }
__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }
__device__ __forceinline__ int first_bit(unsigned bits) { return __ffs(bits) - 1; }  // bits != 0

// Whole numbers alone: their sum does not depend on the order.
__device__ __forceinline__ void add_atomically(int32_t* p, int32_t value) { atomicAdd(p, value); }

// Arithmetic that no compiler fuses into a multiply-add.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// 2^x, to 2 ulp; denormals are flushed.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two numbers rounded to nearest even, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<f16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// d += a b for a 16 x 16 tile of rows and an 8-column tile of columns, in the fragments of PTX's
// mma.m16n8k16; T is bf16 or f16.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&tiles)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&tiles)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory in the background, zeros unless `valid`; there once
// copy_async_wait<n> has left at most n groups, closed by copy_async_commit, under way.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Starts a kernel on the stream; 0, or the cudaError_t.
template <class... Parameters, class... Args>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Stream stream,
           const Args&... args) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace iv2::cuda
#endif
