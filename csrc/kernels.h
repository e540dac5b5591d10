// kernels.h - every native kernel on one page: its argument struct, and one line in IV2_KERNELS.
//
// A struct holds pointers, int64_t and double only, 8 bytes each, so that a binding is a copy of
// the call's arguments in order (bindings.cpp) and a CUDA kernel can take the same struct. Optional
// pointers may be null. Memory belongs to the caller; kernels allocate nothing. `threads` is last:
// results never depend on it, and CUDA kernels ignore it. Shape letters: B batch, T frames, H W
// pixels, N tokens, C width, M rows.
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
// The same on a GPU, where a chunk is a block's and every multiprocessor needs some; `row_chunks`
// in the comments of a struct is this number there.
static constexpr int64_t kMaxCudaRowChunks = 512;
static constexpr int64_t cuda_row_chunks(int64_t rows) {
  return rows < 4 ? 1 : (rows + 3) / 4 < kMaxCudaRowChunks ? (rows + 3) / 4 : kMaxCudaRowChunks;
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

// The GELU between the two GEMMs of an mlp. H is the hidden width.
struct MlpFwd {
  const void* z;  // [M, H] dtype
  void* a;        // [M, H] dtype: gelu(z); may be z
  int64_t rows, dim, dtype, is_tanh;
  int64_t threads;
};

struct MlpBwd {
  const void* z;   // [M, H] dtype
  void* a;         // [M, H] dtype: gelu(z), or null
  void* dz;        // [M, H] dtype: the gradient of gelu(z) on entry, that of z on return
  float* dbias;    // [H]: the sum of dz over rows
  float* scratch;  // [row_chunks(M), H]
  int64_t rows, dim, dtype, is_tanh;
  int64_t threads;
};

struct DistillLossFwd {
  const void* x;             // [B, M, D] x_dtype
  const void* target;        // [B, N, D] target_dtype
  const int64_t* ids;        // [B, M] rows of target, or null: row m
  const float* norm_weight;  // [D]
  const float* norm_bias;    // [D]
  float* loss;               // [1]
  void* dx;                  // [B, M, D] x_dtype, or null; the gradients are times `unit`
  float* dweight;            // [D], or null
  float* dbias;              // [D], null with dweight
  double* sums;              // [row_chunks(B * M)]
  float* scratch;            // [2, row_chunks(B * M), D], null with dweight
  int64_t rows, dim, rows_per_sample, target_rows;
  int64_t x_dtype, target_dtype;
  double eps, unit;
  int64_t threads;
};

struct DistillLossBwd {
  const void* dx_unit;  // [M, D] dtype
  const float* dloss;   // [1], a further factor that the host does not know; null on the CPU
  void* dx;             // [M, D] dtype: scale * dx_unit
  int64_t rows, dim, dtype;
  double scale;
  int64_t threads;
};

// Losses over all pairs of a row of v and a row of t (contrastive_loss, siglip_loss), of logits
// scale * v t^T + bias: M rows of v, and N of t, the columns. Equal labels match. v is taken in
// strips, t in blocks, and columns of gradients in panels (pair_tiles.h).
static constexpr int64_t kPairStrip = 256, kPairBlock = 64, kPairPanel = 128;
static constexpr int64_t pair_blocks(int64_t rows) { return (rows + kPairBlock - 1) / kPairBlock; }
// Floats of scratch a strip needs, and a thread: packed rows, and tiles or what their rows got.
static constexpr int64_t pair_strip_scratch(int64_t columns, int64_t dim, int64_t backward) {
  const int64_t tiles = pair_blocks(columns) * (backward ? kPairBlock : 4);
  return kPairStrip * (2 * ((dim + 15) / 16 * 16 + 16) + tiles);
}
static constexpr int64_t pair_tile_scratch(int64_t dim) {
  return 2 * kPairBlock * ((dim + 15) / 16 * 16 + 16) + kPairStrip * kPairBlock;
}

struct PairLossFwd {
  const void* v;               // [M, D] dtype
  const void* t;               // [N, D] dtype
  const float* labels;         // [M] whole numbers
  const float* column_labels;  // [N] the same
  // [M] 1 / rows of the same label; null in siglip_loss, and without loss
  const float* inverse_counts;
  // [2, M] of rows, then [2, N] of columns: maximum and inverse sum of e^(s - maximum). Without
  // loss, the sum of the terms below the maximum. Null in siglip_loss
  float* stats;
  // [2, M] sums of positives, and how often a row's maximum occurs, then [N] a column's; null with
  // stats
  float* sums;
  // [1], or null for a part of a larger loss, whose statistics are joined by the caller; else M = N
  float* loss;
  double* block_sums;  // [pair_blocks(N)] scratch, null with stats
  float* strip;        // [pair_strip_scratch(N, D, 0)]
  float* tiles;        // [threads, pair_tile_scratch(D)]
  int64_t rows, columns, dim, dtype;
  double scale, bias;
  int64_t threads;
};

// dv and dt are rows of D rounded up to 16, of which the first D count. dloss is of a mean over M,
// also where v and t are parts of a larger loss, whose statistics these are.
struct PairLossBwd {
  const void* v;
  const void* t;
  const float* labels;
  const float* column_labels;
  const float* inverse_counts;
  float* stats;        // as forward left them
  float* dv;           // [M, D rounded up] or null
  float* dt;           // [N, D rounded up] or null
  double* sums;        // [2]: the gradients of scale and of bias
  double* block_sums;  // [pair_blocks(N), 2] scratch
  float* strip;        // [pair_strip_scratch(N, D, 1)]
  float* tiles;        // [threads, pair_tile_scratch(D)]
  int64_t rows, columns, dim, dtype;
  double scale, bias, dloss;
  int64_t threads;
};

// One chunk of rows: their logits become, with want_grads, scale times their gradient.
struct LinearCrossEntropyFwd {
  void* logits;           // [M, V] dtype
  const int64_t* target;  // [M], in [0, V)
  double* losses;         // [M]
  float* dbias;           // [V]: the sum of the gradient over rows is added to it; or null
  float* stats;           // [2, M] scratch
  int64_t rows, vocabulary, dtype, want_grads;
  double label_smoothing, scale;
  int64_t threads;
};

struct MasksDraw {
  const int64_t* seeds;  // [B]
  const float* weights;  // [B, rows, N], or null: all 1
  int32_t* ids;          // [B, rows * repeat * keep], sorted; indices into rows * N (repeat * N)
  uint32_t* keys;        // [B, rows, N] scratch
  // [1], set to 1 where a weight is negative or not finite. Null on a GPU, where such a row's ids
  // are all -1
  int64_t* bad;
  int64_t batch, rows, tokens, keep, repeat;  // rows or repeat is 1
  int64_t stream;
  int64_t threads;
};

// Rows and columns of a tile of hard_negatives' scores.
static constexpr int64_t kHardNegativesRows = 64;
static constexpr int64_t kHardNegativesColumns = 128;

struct HardNegativesDraw {
  const float* v;          // [B, D]
  const float* t_columns;  // [column blocks, D, kHardNegativesColumns]: t transposed, zeros past B
  const int32_t* classes;  // [B]; rows of one class are not negatives of each other
  const int64_t* seeds;    // [B]
  int32_t* neg_t;          // [B], or -1
  int32_t* neg_v;          // [B], or -1
  float* best;             // [chunks, B] scratch
  int32_t* best_row;       // [chunks, B] scratch
  int64_t batch, dim, chunks;
  int64_t stream;
  double scale;  // log2(e) / temperature
  int64_t threads;
};

// Attention. Inputs are strided views with a contiguous head_dim: dense [B, N, heads, head_dim],
// or, with cu_seqlens, [total, heads, head_dim] of `batch` sequences laid end to end, of which
// q_len and k_len are the longest. A token is numbered over the whole batch: b * N + i, or its row.
// With q_gain, q stands for q * q_rstd * q_gain and k for k * k_rstd (spatiotemporal_attention).
// On a GPU rows are aligned to 16 bytes, and neither tiles nor q_gain is given.
struct AttentionFwd {
  const void* q;                // [B, Nq, heads, head_dim] dtype
  const void* k;                // [B, Nk, kv_heads, head_dim] dtype
  const void* v;                // [B, Nk, kv_heads, head_dim] dtype
  const int32_t* cu_seqlens_q;  // [B + 1] or null
  const int32_t* cu_seqlens_k;  // [B + 1], null with cu_seqlens_q
  const int32_t* tiles;         // [num_tiles, 4], or null: all see all. Queries of a tile (at most
                         // kAttentionQueries): first, count, and their rows of runs: from, to
  const int32_t* runs;  // [R, 2] keys that a tile sees: first, end; null with tiles
  const float* q_gain;  // [heads, head_dim] or null
  const float* q_rstd;  // [B * Nq], null with q_gain
  const float* k_rstd;  // [B * Nk], null with q_gain
  void* o;              // [B, Nq, heads, head_dim] dtype, contiguous
  float* lse;           // [B, heads, Nq] or [heads, total_q]; -inf where no key is visible
  float* scratch;       // [threads, attention_fwd_scratch(head_dim, k_len)], null on a GPU
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, total_q, num_tiles;
  int64_t q_batch, q_token, q_head;  // strides in elements
  int64_t k_batch, k_token, k_head;
  int64_t v_batch, v_token, v_head;
  int64_t dtype, causal;
  double scale;
  int64_t threads;
};

// Gradients are rows of tokens, `dq_token` and `dkv_token` elements apart, heads contiguous in a
// row.
struct AttentionBwd {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* tiles;  // as in AttentionFwd, of at most kAttentionBlock keys that see queries
  const int32_t* runs;
  const float* q_gain;
  const float* q_rstd;
  const float* k_rstd;
  const void* o;      // [B, Nq, heads, head_dim] dtype, contiguous
  const void* d_o;    // the same
  const float* lse;   // as in AttentionFwd
  const float* dlse;  // the same, or null
  void* dq;           // rows of [heads, head_dim] dtype, or null: the partial sums are left
  void* dk;           // rows of [kv_heads, head_dim] dtype, or null
  void* dv;           // rows of [kv_heads, head_dim] dtype
  float* dq_partial;  // [key_chunks, total_q, heads, head_dim], or null when key_chunks is 1
  float* dk_direct;   // [total_k, kv_heads, head_dim], the gradient of k * k_rstd's k; null with dk
  float* scratch;     // [threads, attention_bwd_scratch(...)]; on a GPU one for each of lse
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, total_q, num_tiles;
  int64_t q_batch, q_token, q_head;
  int64_t k_batch, k_token, k_head;
  int64_t v_batch, v_token, v_head;
  int64_t dq_token, dkv_token;
  int64_t key_chunks;  // attention_key_chunks(batch, kv_heads, k_len); 1 of long sequences
  int64_t dtype, causal;
  double scale;
  int64_t threads;
};

// Queries and keys of a tile; forward takes 48 queries, whole register tiles, and in bf16 128 keys.
static constexpr int64_t kAttentionBlock = 64;
static constexpr int64_t kAttentionQueries = 48;
static constexpr int64_t attention_blocks(int64_t tokens) {
  return (tokens + kAttentionBlock - 1) / kAttentionBlock;
}
static constexpr int64_t attention_pad(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Extra memory does not grow beyond this many tokens: forward goes over longer sequences in spans
// of so many keys, with the sums of kAttentionGroup tiles of queries at hand; backward goes over
// them twice, for the gradients of k and v and then for that of q.
static constexpr int64_t kAttentionSpan = 8192;
static constexpr int64_t kAttentionGroup = 16;
static constexpr int64_t attention_span(int64_t tokens) {
  return tokens < kAttentionSpan ? tokens : kAttentionSpan;
}
static constexpr bool attention_bwd_is_long(int64_t q_len, int64_t k_len, int64_t heads_per_kv) {
  return q_len > kAttentionSpan || (heads_per_kv > 1 && k_len > kAttentionSpan);
}

// Floats of scratch a thread needs: packed keys and values of a span, and tiles.
static constexpr int64_t attention_fwd_scratch(int64_t head_dim, int64_t k_len) {
  const int64_t pad = attention_pad(head_dim), blocks = attention_blocks(attention_span(k_len)) + 1;
  const int64_t group = k_len > kAttentionSpan ? kAttentionGroup : 1;
  return kAttentionBlock * (blocks * (2 * pad + 2) + 2 * pad + 128 + group * (2 * pad + 18));
}
// The same: packed queries and output gradients of a span with the gradient of q, the gradients of
// k and v (of one block, of a group of them, or of a sequence when heads share them), and tiles.
static constexpr int64_t attention_bwd_scratch(int64_t head_dim, int64_t q_len, int64_t k_len,
                                               int64_t heads_per_kv) {
  const int64_t pad = attention_pad(head_dim), q_blocks = attention_blocks(attention_span(q_len));
  const int64_t k_blocks = attention_bwd_is_long(q_len, k_len, heads_per_kv) ? kAttentionGroup
                           : heads_per_kv > 1 ? attention_blocks(k_len)
                                              : 1;
  return kAttentionBlock *
         (q_blocks * (5 * pad + 2) + k_blocks * 2 * pad + 4 * pad + 3 * kAttentionBlock + 1);
}
// Backward splits the keys of few heads into chunks, which are summed in order; a function of the
// shape alone, so that results do not depend on the number of threads. Long ones are not split.
static constexpr int64_t attention_key_chunks(int64_t batch, int64_t kv_heads, int64_t k_len) {
  const int64_t tasks = batch * kv_heads > 0 ? batch * kv_heads : 1;
  const int64_t wanted = (15 + tasks) / tasks, most = k_len / 512 > 0 ? k_len / 512 : 1;
  return wanted < most ? wanted : most;
}

struct SpatiotemporalAttentionNormFwd {
  const void* qkv;  // [M, 3, C] dtype
  float* rstd;      // [2, M]: of q and of k
  int64_t rows, dim, dtype;
  double eps;
  int64_t threads;
};

struct SpatiotemporalAttentionNormBwd {
  const void* qkv;         // [M, 3, C] dtype
  const float* rstd;       // [2, M]
  const float* gain;       // [C], q_weight * k_weight
  float* dq_partial;       // [chunks, M, C]; overwritten
  const float* dk_direct;  // [M, C]
  void* dqkv;              // [M, 3, C] dtype; the first two thirds of a row are written
  float* dgain;            // [C]
  float* scratch;          // [row_chunks(M), C]
  int64_t rows, dim, chunks, dtype;
  int64_t threads;
};

// Tubelets as rows in the order of the weight. Pixel strides are in elements; video_w is 3 for
// bytes, whose channels are neighbours, and 1 for floats.
struct PatchEmbedGather {
  const void* video;   // [B, T, H, W, 3] bytes or [B, 3, T, H, W] video_dtype
  const int32_t* ids;  // [B, keep], or null: all
  const void* table;   // [3, 256] dtype, what a byte stands for; null for floats
  void* patches;       // [B, first + keep, 3 * tubelet * patch^2] dtype; `first` rows of zeros
  int64_t batch, keep, first, grid_t, grid_h, grid_w, tubelet, patch;
  int64_t video_b, video_c, video_t, video_h, video_w;
  int64_t video_dtype, dtype;  // dtype is fp32 or bf16, on a GPU also fp16
  int64_t threads;
};

struct PatchEmbedAdd {
  const void* y;  // [B, first + keep, C] dtype (on the CPU fp32 where dtype is fp16); may be out
  const float* bias;                        // [C] or null
  const void* pos_embed;                    // [first + N, C] pos_dtype, or null
  const float* cls_token;                   // [C], null unless first is 1
  const int32_t* ids;                       // [B, keep], or null: all
  void* out;                                // [B, first + keep, C] dtype
  int64_t batch, keep, first, tokens, dim;  // tokens is N
  int64_t dtype, pos_dtype;
  int64_t threads;
};

struct PatchEmbedBwd {
  const void* dy;     // [B, first + keep, C] dtype
  float* dbias;       // [C]
  float* dcls_token;  // [C] or null
  float* scratch;     // [row_chunks(B * keep), C]
  int64_t batch, keep, first, dim, dtype;
  int64_t threads;
};

// Pairs of channels of a head, at most.
static constexpr int64_t kRopePairs = 256;

struct Rope3dFwd {
  const void* x;       // [B, first + N, heads, head_dim] dtype, a head contiguous
  void* y;             // the same, contiguous
  const int32_t* ids;  // [B, N], or null: all of the grid in order
  const float* cos;    // [grid_t, pairs_t], then [grid_h, pairs_h], then [grid_w, pairs_w]
  const float* sin;    // the same
  int64_t batch, tokens, first;  // tokens is first + N
  int64_t heads, head_dim;
  int64_t grid_t, grid_h, grid_w;
  int64_t pairs_t, pairs_h, pairs_w;  // add up to head_dim / 2
  int64_t x_batch, x_token, x_head;   // strides in elements
  int64_t dtype;
  int64_t threads;
};

struct GatherTokensFwd {
  const void* x;       // [B or 1, N, C] x_dtype, rows contiguous
  const int32_t* ids;  // [B, keep]
  const void* add;     // [B, keep, C] y_dtype, or null
  void* y;             // [B, keep, C] y_dtype
  int64_t batch, tokens, keep, dim;
  int64_t x_batch, x_token;  // strides in elements; x_batch is 0 where all samples share x
  int64_t x_dtype, y_dtype;
  int64_t threads;
};

struct GatherTokensBwd {
  const void* dy;      // [B, keep, C] dy_dtype, samples dy_batch elements apart
  const int32_t* ids;  // [B, keep]
  void* dx;            // [x_batch, N, C] dx_dtype
  int32_t* starts;     // [x_batch * N + 2] scratch
  int32_t* order;      // [B, keep] scratch
  int64_t batch, x_batch, tokens, keep, dim;  // x_batch is batch or 1
  int64_t dy_batch;
  int64_t dy_dtype, dx_dtype;
  int64_t threads;
};

struct ResizedCropNormalizeFwd {
  const uint8_t* pixels;     // [T, crop height, crop width, 3], pixels contiguous: the crop's first
  const int32_t* y_first;    // [height] first crop row under the filter of an output row
  const float* y_weights;    // [height, y_taps]
  const int32_t* x_first;    // [width] first crop column
  const float* x_weights;    // [width, x_taps]
  const float* scale_shift;  // [2, 3]: out = byte * scale + shift
  void* out;                 // [3, T, height, width] dtype, or [T, height, width, 3] bytes
  float* scratch;            // [threads, 3 * crop_width + 1 + 5 * width]
  int64_t frames, height, width, crop_width, y_taps, x_taps;
  int64_t frames_t, frames_h;  // strides in bytes
  int64_t dtype;
  int64_t threads;
};

// What depends on tokens and heads is [B, N, lanes]: lanes is heads rounded up to 16.
struct AttentionPoolFwd {
  const void* x;       // [B, N, C] dtype
  const float* query;  // [B, heads, C]
  void* z;             // [B, heads, C] dtype
  float* probs;        // [B, N]
  float* mean;         // [B, N]
  float* rstd;         // [B, N]
  float* logits;       // [B, N, lanes]
  float* p;            // [B, N, lanes]
  float* transposed;   // [B, C, lanes], scratch
  int64_t batch, tokens, heads, lanes, dim, dtype;
  double eps;
  int64_t threads;
};

struct AttentionPoolBwd {
  const void* x;        // [B, N, C] dtype
  const float* query;   // [B, heads, C]
  const float* dz;      // [B, heads, C]
  float* mean;          // [B, N], as forward left them; so are rstd, logits and p
  float* rstd;          // [B, N]
  const float* logits;  // [B, N, lanes]
  const float* p;       // [B, N, lanes]
  void* dx;             // [B, N, C] dtype, or null
  float* dquery;        // [B, heads, C], or null
  float* transposed;    // [B, C, lanes], scratch
  float* dp;            // [B, N, lanes], scratch
  float* sums;          // [B, 3, lanes], scratch
  float* means;         // [2, B, N], scratch
  int64_t batch, tokens, heads, lanes, dim, dtype;
  int64_t threads;
};

}  // namespace iv2

#define IV2_KERNELS(K)                                                 \
  K(add_rms_norm_fwd, AddRmsNormFwd)                                   \
  K(add_rms_norm_bwd, AddRmsNormBwd)                                   \
  K(distill_loss_fwd, DistillLossFwd)                                  \
  K(distill_loss_bwd, DistillLossBwd)                                  \
  K(contrastive_loss_fwd, PairLossFwd)                                 \
  K(contrastive_loss_bwd, PairLossBwd)                                 \
  K(siglip_loss_fwd, PairLossFwd)                                      \
  K(siglip_loss_bwd, PairLossBwd)                                      \
  K(linear_cross_entropy_fwd, LinearCrossEntropyFwd)                   \
  K(mlp_fwd, MlpFwd)                                                   \
  K(mlp_bwd, MlpBwd)                                                   \
  K(attention_pool_fwd, AttentionPoolFwd)                              \
  K(attention_pool_bwd, AttentionPoolBwd)                              \
  K(masks_draw, MasksDraw)                                             \
  K(hard_negatives_draw, HardNegativesDraw)                            \
  K(attention_fwd, AttentionFwd)                                       \
  K(attention_bwd, AttentionBwd)                                       \
  K(spatiotemporal_attention_norm_fwd, SpatiotemporalAttentionNormFwd) \
  K(spatiotemporal_attention_norm_bwd, SpatiotemporalAttentionNormBwd) \
  K(patch_embed_gather, PatchEmbedGather)                              \
  K(patch_embed_add, PatchEmbedAdd)                                    \
  K(patch_embed_bwd, PatchEmbedBwd)                                    \
  K(gather_tokens_fwd, GatherTokensFwd)                                \
  K(gather_tokens_bwd, GatherTokensBwd)                                \
  K(rope3d_fwd, Rope3dFwd)                                             \
  K(resized_crop_normalize_fwd, ResizedCropNormalizeFwd)

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

// The kernels that csrc/cuda has, of the same structs. They start on the current device's stream, a
// cudaStream_t, and return 0 or the cudaError_t.
#define IV2_CUDA_KERNELS(K)               \
  K(add_rms_norm_fwd, AddRmsNormFwd)      \
  K(add_rms_norm_bwd, AddRmsNormBwd)      \
  K(attention_fwd, AttentionFwd)          \
  K(attention_bwd, AttentionBwd)          \
  K(distill_loss_fwd, DistillLossFwd)     \
  K(distill_loss_bwd, DistillLossBwd)     \
  K(gather_tokens_fwd, GatherTokensFwd)   \
  K(gather_tokens_bwd, GatherTokensBwd)   \
  K(masks_draw, MasksDraw)                \
  K(patch_embed_gather, PatchEmbedGather) \
  K(patch_embed_add, PatchEmbedAdd)       \
  K(patch_embed_bwd, PatchEmbedBwd)

namespace iv2::cuda {
#define IV2_DECLARE_CUDA(name, Args) int name(const Args&, void* stream);
IV2_CUDA_KERNELS(IV2_DECLARE_CUDA)
#undef IV2_DECLARE_CUDA
}  // namespace iv2::cuda
