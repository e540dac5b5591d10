// distill_loss.cu - mean over rows of 2 - 2 cos(LayerNorm(x) w + b, target row), and its gradients.
//
// A block takes a chunk of rows, one after the other. It holds a row of x and one of the target in
// registers through four passes: the mean, the variance, seven sums that give the cosine and the
// two means of LayerNorm's backward, and the gradient; the chunk's shares of the loss, dweight and
// dbias stay in registers too. Two more launches add the chunks in a fixed order. Rows that are too
// long, or not made of aligned packs, go element by element and are read again. As on the CPU the
// gradients are known up to a factor before backward, and stored times `unit`. Bound by memory: one
// read of x and of the target's rows, one write of dx. An id out of range makes the loss NaN.
#include "pack.cuh"
#include "reduce.cuh"

namespace iv2::cuda {
namespace {

constexpr float kLeastNorm = 1e-8f;  // torch.nn.functional.cosine_similarity's

enum { kYT, kYY, kTT, kWT, kWY, kWHT, kWHY, kSums };

struct Part {
  float mean[1][kMaxWarps], squares[1][kMaxWarps], sums[kSums][kMaxWarps];
};

// A row of x and its target's, of which this thread has K packs of N, or reads them each time.
template <class X, class T, int N, int K>
struct Row {
  const X* x;
  const T* target;
  Pack<X, N> kept_x[K > 0 ? K : 1];
  Pack<T, N> kept_target[K > 0 ? K : 1];
  float mean, rstd;

  __device__ __forceinline__ void read_packs(int64_t i, int k) {
    kept_x[k] = load<N>(x + i);
    kept_target[k] = load<N>(target + i);
  }
  __device__ __forceinline__ void again(int64_t i, int k) {
    if (K == 0) read_packs(i, k);
  }
  __device__ __forceinline__ float centred(int k, int j) const {
    return to_float(kept_x[k].v[j]) - mean;
  }
  __device__ __forceinline__ float target_at(int k, int j) const {
    return to_float(kept_target[k].v[j]);
  }

  __device__ __forceinline__ void measure(const DistillLossFwd& a, Part& part) {
    const float count = static_cast<float>(a.dim);
    float sum[1] = {0}, squares[1] = {0};
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      read_packs(i, k);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[0] += to_float(kept_x[k].v[j]);
    });
    block_sum(sum, part.mean);
    mean = sum[0] / count;
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      again(i, k);
#pragma unroll
      for (int j = 0; j < N; ++j) squares[0] += centred(k, j) * centred(k, j);
    });
    block_sum(squares, part.squares);
    rstd = 1.0f / sqrtf(squares[0] / count + static_cast<float>(a.eps));
  }

  // With h = (x - mean) rstd and y = w h + b, sums of y t, y y, t t, w t, w y, w h t and w h y.
  __device__ __forceinline__ void add_up(const DistillLossFwd& a, float (&sums)[kSums]) {
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      again(i, k);
      const Pack<float, N> weight = load_cached<N>(a.norm_weight + i);
      const Pack<float, N> bias = load_cached<N>(a.norm_bias + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float w = weight.v[j], t = target_at(k, j), wh = w * (centred(k, j) * rstd);
        const float y = wh + bias.v[j];
        sums[kYT] += y * t;
        sums[kYY] += y * y;
        sums[kTT] += t * t;
        sums[kWT] += w * t;
        sums[kWY] += w * y;
        sums[kWHT] += wh * t;
        sums[kWHY] += wh * y;
      }
    });
  }
};

// The gradient of y is by_t t - by_y y; from there back through the norm.
template <class X, class T, int N, int K>
__device__ __forceinline__ void row_grads(const DistillLossFwd& a, Row<X, T, N, K>& row, float by_t,
                                          float by_y, const float (&sums)[kSums], X* dx,
                                          float* chunk, int64_t stride,
                                          float (&dweight)[K > 0 ? K : 1][N],
                                          float (&dbias)[K > 0 ? K : 1][N]) {
  const float count = static_cast<float>(a.dim);
  const float mean = (by_t * sums[kWT] - by_y * sums[kWY]) / count;
  const float mean_h = (by_t * sums[kWHT] - by_y * sums[kWHY]) / count;
  for_packs<N, K>(a.dim, [&](int64_t i, int k) {
    row.again(i, k);
    const Pack<float, N> weight = load_cached<N>(a.norm_weight + i);
    const Pack<float, N> bias = load_cached<N>(a.norm_bias + i);
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float h = row.centred(k, j) * row.rstd, y = weight.v[j] * h + bias.v[j];
      const float dy = by_t * row.target_at(k, j) - by_y * y;
      if (K > 0) {
        dweight[k][j] += dy * h;
        dbias[k][j] += dy;
      } else if (a.dweight) {
        write(chunk + i, read(chunk + i) + dy * h);
        write(chunk + stride + i, read(chunk + stride + i) + dy);
      }
      out[j] = (dy * weight.v[j] - mean - h * mean_h) * row.rstd;
    }
    if (dx) store(dx + i, from_floats<X>(out));
  });
}

// The blocks that a multiprocessor holds at least are stated: left to itself, the assembler spills
// a register or two to make room for one more.
template <class X, class T, int N, int K>
__global__ void __launch_bounds__(kRowThreads<K>, K == 2 ? 1 : 3)
    fwd_kernel(const DistillLossFwd a, float factor) {
  IV2_SHARED(Part, parts, [1]);
  const int64_t index = blockIdx.x, chunks = gridDim.x, stride = chunks * a.dim;
  float* chunk = a.scratch + index * a.dim;
  float dweight[K > 0 ? K : 1][N] = {}, dbias[K > 0 ? K : 1][N] = {};
  const auto store_sums = [&] {
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      Pack<float, N> weight, bias;
#pragma unroll
      for (int j = 0; j < N; ++j) weight.v[j] = dweight[k][j], bias.v[j] = dbias[k][j];
      store(chunk + i, weight);
      store(chunk + stride + i, bias);
    });
  };
  if (K == 0 && a.dweight) store_sums();
  double loss = 0;
  for (int64_t m = a.rows * index / chunks; m < a.rows * (index + 1) / chunks; ++m) {
    int64_t id = a.ids ? read_cached(a.ids + m) : m % a.rows_per_sample;
    const bool is_bad = id < 0 || id >= a.target_rows;
    if (is_bad) id = 0;
    Row<X, T, N, K> row;
    row.x = static_cast<const X*>(a.x) + m * a.dim;
    row.target =
        static_cast<const T*>(a.target) + (m / a.rows_per_sample * a.target_rows + id) * a.dim;
    row.measure(a, parts[0]);
    float sums[kSums] = {};
    row.add_up(a, sums);
    block_sum(sums, parts[0].sums);
    if (is_bad) sums[kYT] = float_from_bits(0x7FFFFFFFu);
    const float length = sqrtf(sums[kYY]), least = fmaxf(length, kLeastNorm);
    const float target_length = fmaxf(sqrtf(sums[kTT]), kLeastNorm);
    const float cosine = sums[kYT] / (least * target_length);
    loss += 2.0f - 2.0f * cosine;
    if (a.dx == nullptr && a.dweight == nullptr) continue;
    // the clamp of the length is not differentiated, the length is, as torch does
    const float by_y = length > 0 ? factor * cosine / (least * length) : 0.0f;
    row_grads(a, row, factor / (least * target_length), by_y, sums,
              a.dx ? static_cast<X*>(a.dx) + m * a.dim : nullptr, chunk, stride, dweight, dbias);
  }
  if (threadIdx.x == 0) write(a.sums + index, loss);
  if (K > 0 && a.dweight) store_sums();
}

// loss = the sum of the chunks' over the rows, by one warp.
__global__ void __launch_bounds__(32)
    mean_kernel(const double* sums, int64_t chunks, int64_t rows, float* loss) {
  double total = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += 32) total += read(sums + c);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) total += shuffle_xor(total, distance);
  if (threadIdx.x == 0) write(loss, static_cast<float>(total / static_cast<double>(rows)));
}

template <class X, int N>
__global__ void __launch_bounds__(256) bwd_kernel(const DistillLossBwd a) {
  const float scale = static_cast<float>(a.scale) * (a.dloss ? read_cached(a.dloss) : 1.0f);
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i >= a.rows * a.dim) return;
  const Pack<X, N> unit = load<N>(static_cast<const X*>(a.dx_unit) + i);
  float out[N];
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = to_float(unit.v[j]) * scale;
  store(static_cast<X*>(a.dx) + i, from_floats<X>(out));
}

// f(X{}, T{}, N, K, threads): packs where the target is of x's dtype or float32, else elements.
template <class F>
int by_shape(const DistillLossFwd& a, F f) {
  const bool aligned = all_aligned(a.x, a.target, a.norm_weight, a.norm_bias, a.dx, a.scratch);
  return by_dtype(a.x_dtype, [&](auto x) {
    return by_dtype(a.target_dtype, [&](auto t) {
      using X = decltype(x);
      using T = decltype(t);
      constexpr int size = pack_size<X, T>;
      constexpr bool usual = std::is_same_v<X, T> || std::is_same_v<T, float>;
      const RowShape shape = row_shape(a.dim, size, aligned && usual);
      if constexpr (usual) {
        if (shape.packs == 1) return f(x, t, Int<size>{}, Int<1>{}, shape.threads);
        if (shape.packs == 2) return f(x, t, Int<size>{}, Int<2>{}, shape.threads);
      }
      return f(x, t, Int<1>{}, Int<0>{}, shape.threads);
    });
  });
}

}  // namespace

int distill_loss_fwd(const DistillLossFwd& a, Stream stream) {
  const int64_t chunks = cuda_row_chunks(a.rows);
  const float factor = static_cast<float>(-2.0 * a.unit / static_cast<double>(a.rows));
  int error = by_shape(a, [&](auto x, auto t, auto n, auto k, unsigned threads) {
    return launch(fwd_kernel<decltype(x), decltype(t), n.value, k.value>,
                  dim3(static_cast<unsigned>(chunks)), dim3(threads), 0, stream, a, factor);
  });
  if (error != 0) return error;
  error = launch(mean_kernel, dim3(1), dim3(32), 0, stream, static_cast<const double*>(a.sums),
                 chunks, a.rows, a.loss);
  if (error != 0 || a.dweight == nullptr) return error;
  return sum_chunks(a.scratch, chunks, a.dim, a.dweight, a.dbias, stream);
}

int distill_loss_bwd(const DistillLossBwd& a, Stream stream) {
  return by_dtype(a.dtype, [&](auto x) {
    using X = decltype(x);
    constexpr int size = 16 / sizeof(X);
    const int64_t count = a.rows * a.dim;
    const bool whole = count % size == 0 && all_aligned(a.dx_unit, a.dx);
    const int64_t each = 256 * (whole ? size : 1);
    const dim3 grid(static_cast<unsigned>((count + each - 1) / each));
    if (whole) return launch(bwd_kernel<X, size>, grid, dim3(256), 0, stream, a);
    return launch(bwd_kernel<X, 1>, grid, dim3(256), 0, stream, a);
  });
}

}  // namespace iv2::cuda
