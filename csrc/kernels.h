// kernels.h - every native kernel on one page: its argument struct, and one line in IV2_KERNELS.
//
// A struct holds pointers, int64_t and double only, 8 bytes each, so that a binding is a copy of
// the call's arguments in order (bindings.cpp) and a CUDA kernel can take the same struct. Optional
// pointers may be null. Memory belongs to the caller; kernels allocate nothing. `threads` is last:
// results never depend on it. Shape letters: B batch, T frames, H W pixels, N tokens, C width, M
// rows.
#pragma once
#include <cstdint>

namespace iv2 {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };

// Sums over rows (weight gradients) are taken in chunks, each chunk by one thread, chunks added in
// order: the result depends on M alone. The caller provides [row_chunks(M), C] floats of scratch.
static constexpr int64_t kMaxRowChunks = 64;
static constexpr int64_t row_chunks(int64_t rows) {
  return rows < 16 ? 1 : (rows + 15) / 16 < kMaxRowChunks ? (rows + 15) / 16 : kMaxRowChunks;
}

struct AddRmsNormFwd {
  const void* x;             // [M, C] x_dtype
  const void* residual;      // [M, C] r_dtype, or null
  const float* weight;       // [C]
  const float* layer_scale;  // [C] or null
  const float* drop_scale;   // [B] or null; row m belongs to sample m / rows_per_sample
  void* y;                   // [M, C] x_dtype
  void* r;                   // [M, C] r_dtype
  float* rstd;               // [M]
  int64_t rows, dim, rows_per_sample;
  int64_t x_dtype, r_dtype;
  double eps;
  int64_t threads;
};

struct AddRmsNormBwd {
  const void* dy;            // [M, C] x_dtype, or null
  const void* dr;            // [M, C] r_dtype, or null
  const void* x;             // [M, C] x_dtype, null unless dlayer_scale is wanted
  const void* r;             // [M, C] r_dtype
  const float* rstd;         // [M]
  const float* weight;       // [C]
  const float* layer_scale;  // [C] or null
  const float* drop_scale;   // [B] or null
  void* dx;                  // [M, C] x_dtype
  void* dresidual;           // [M, C] r_dtype, or null
  float* dweight;            // [C]
  float* dlayer_scale;       // [C] or null
  float* scratch;            // [2, row_chunks(M), C]
  int64_t rows, dim, rows_per_sample;
  int64_t x_dtype, r_dtype;
  int64_t threads;
};

struct DistillLossFwd {
  const void* x;             // [B, M, D] x_dtype
  const void* target;        // [B, N, D] target_dtype
  const int64_t* ids;        // [B, M] rows of target, or null: row m
  const float* norm_weight;  // [D]
  const float* norm_bias;    // [D]
  float* loss;               // [1]
  void* dx;                  // [B, M, D] x_dtype, or null; the gradients times B * M * D
  float* dweight;            // [D], or null
  float* dbias;              // [D], null with dweight
  double* sums;              // [row_chunks(B * M)]
  float* scratch;            // [2, row_chunks(B * M), D], null with dweight
  int64_t rows, dim, rows_per_sample, target_rows;
  int64_t x_dtype, target_dtype;
  double eps;
  int64_t threads;
};

struct DistillLossBwd {
  const void* dx_unit;  // [M, D] dtype
  void* dx;             // [M, D] dtype: scale * dx_unit
  int64_t rows, dim, dtype;
  double scale;
  int64_t threads;
};

struct MasksDraw {
  const int64_t* seeds;  // [B]
  const float* weights;  // [B, rows, N], or null: all 1
  int32_t* ids;          // [B, rows * repeat * keep], sorted; indices into rows * N (repeat * N)
  uint32_t* keys;        // [B, rows, N] scratch
  int64_t* bad;          // [1], set to 1 where a weight is negative or not finite
  int64_t batch, rows, tokens, keep, repeat;  // rows or repeat is 1
  int64_t stream;
  int64_t threads;
};

}  // namespace iv2

#define IV2_KERNELS(K)                \
  K(add_rms_norm_fwd, AddRmsNormFwd)  \
  K(add_rms_norm_bwd, AddRmsNormBwd)  \
  K(distill_loss_fwd, DistillLossFwd) \
  K(distill_loss_bwd, DistillLossBwd) \
  K(masks_draw, MasksDraw)

// One table of kernels per instruction set; isa.cpp fills them and cpu::table() is the one in use.
namespace iv2 {
#define IV2_FIELD(name, Args) void (*name)(const Args&);
struct Kernels {
  IV2_KERNELS(IV2_FIELD)
};
#undef IV2_FIELD
}  // namespace iv2

#define IV2_DECLARE_IN(isa) \
  namespace iv2::isa {      \
  IV2_KERNELS(IV2_DECLARE)  \
  }
#define IV2_DECLARE(name, Args) void name(const Args&);
IV2_DECLARE_IN(scalar)
IV2_DECLARE_IN(avx2)
IV2_DECLARE_IN(avx512)
IV2_DECLARE_IN(avx512_bf16)

namespace iv2::cpu {
const Kernels& table();
}  // namespace iv2::cpu
