// add_rms_norm.cu - r = residual + drop_scale * layer_scale * x; y = r / rms(r) * weight, and the
// gradients.
//
// Forward gives a row to a block, which holds it in registers between the sum of squares and the
// output. Backward gives a block a chunk of rows, one after the other, whose share of dweight and
// dlayer_scale stays in registers too; a second launch adds the chunks. Rows that are too long, or
// not made of aligned 16-byte packs, go element by element and are read again. Bound by memory:
// forward reads x and residual and writes y and r, backward reads dy, dr, r (and x) and writes dx
// and dresidual, each once.
#include "pack.cuh"
#include "reduce.cuh"

namespace iv2::cuda {
namespace {

template <class X, class R, int N, int K>
__global__ void __launch_bounds__(kRowThreads<K>) fwd_kernel(const AddRmsNormFwd a) {
  IV2_SHARED(float, part, [1][kMaxWarps]);
  const int64_t m = blockIdx.x, row = m * a.dim;
  const float drop = a.drop_scale ? read_cached(a.drop_scale + m / a.rows_per_sample) : 1.0f;
  const X* x = static_cast<const X*>(a.x) + row;
  const R* residual = static_cast<const R*>(a.residual) + row;
  R* r = static_cast<R*>(a.r) + row;
  X* y = static_cast<X*>(a.y) + row;
  Pack<R, N> kept[K > 0 ? K : 1];
  float squares[1] = {0};
  for_packs<N, K>(a.dim, [&](int64_t i, int k) {
    const Pack<X, N> branch = load<N>(x + i);
    Pack<R, N> other;
    Pack<float, N> scale;
    if (a.residual) other = load<N>(residual + i);
    if (a.layer_scale) scale = load_cached<N>(a.layer_scale + i);
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j] = to_float(branch.v[j]);
      if (a.drop_scale) sum[j] *= drop;
      if (a.layer_scale) sum[j] *= scale.v[j];
      if (a.residual) sum[j] += to_float(other.v[j]);
    }
    const Pack<R, N> stored = from_floats<R>(sum);
    store(r + i, stored);
    // y is the norm of r as it is stored: backward has no other
#pragma unroll
    for (int j = 0; j < N; ++j) squares[0] += to_float(stored.v[j]) * to_float(stored.v[j]);
    kept[k] = stored;
  });
  block_sum(squares, part);
  const float rstd =
      1.0f / sqrtf(squares[0] / static_cast<float>(a.dim) + static_cast<float>(a.eps));
  if (threadIdx.x == 0) write(a.rstd + m, rstd);
  for_packs<N, K>(a.dim, [&](int64_t i, int k) {
    const Pack<R, N> stored = K > 0 ? kept[k] : load<N>(r + i);
    const Pack<float, N> weight = load_cached<N>(a.weight + i);
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = to_float(stored.v[j]) * rstd * weight.v[j];
    store(y + i, from_floats<X>(out));
  });
}

// What backward knows of row m; `sums` are this block's dweight and, dim further on, dlayer_scale.
template <class X, class R, int N, int K>
__device__ __forceinline__ void bwd_row(const AddRmsNormBwd& a, int64_t m,
                                        float (&part)[1][kMaxWarps], float* sums, int64_t stride,
                                        float (&dweight)[K > 0 ? K : 1][N],
                                        float (&dscale)[K > 0 ? K : 1][N]) {
  const int64_t row = m * a.dim;
  const float drop = a.drop_scale ? read_cached(a.drop_scale + m / a.rows_per_sample) : 1.0f;
  const float rstd = read_cached(a.rstd + m);
  const X* dy = static_cast<const X*>(a.dy) + row;
  const R* r = static_cast<const R*>(a.r) + row;
  Pack<X, N> kept_dy[K > 0 ? K : 1];
  Pack<R, N> kept_r[K > 0 ? K : 1];
  float dot[1] = {0};
  if (a.dy) {
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      kept_dy[k] = load<N>(dy + i);
      kept_r[k] = load<N>(r + i);
      const Pack<float, N> weight = load_cached<N>(a.weight + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float product = to_float(kept_dy[k].v[j]) * (to_float(kept_r[k].v[j]) * rstd);
        if (K > 0) {
          dweight[k][j] += product;
        } else {
          write(sums + i + j, read(sums + i + j) + product);
        }
        dot[0] += product * weight.v[j];
      }
    });
    block_sum(dot, part);
  }
  const float mean = dot[0] / static_cast<float>(a.dim);
  for_packs<N, K>(a.dim, [&](int64_t i, int k) {
    float total[N], dx[N];
    Pack<X, N> x;
    Pack<R, N> dr;
    Pack<float, N> weight, scale;
    if (a.dr) dr = load<N>(static_cast<const R*>(a.dr) + row + i);
    if (a.dlayer_scale) x = load<N>(static_cast<const X*>(a.x) + row + i);
    if (a.layer_scale) scale = load_cached<N>(a.layer_scale + i);
    if (a.dy) {
      weight = load_cached<N>(a.weight + i);
      if (K == 0) {
        kept_dy[0] = load<N>(dy + i);
        kept_r[0] = load<N>(r + i);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      total[j] = 0;
      if (a.dy) {
        const float normed = to_float(kept_r[k].v[j]) * rstd;
        total[j] = rstd * (to_float(kept_dy[k].v[j]) * weight.v[j] - normed * mean);
      }
      if (a.dr) total[j] += to_float(dr.v[j]);
      dx[j] = a.drop_scale ? total[j] * drop : total[j];
      if (a.dlayer_scale) {
        if (K > 0) {
          dscale[k][j] += dx[j] * to_float(x.v[j]);
        } else {
          float* sum = sums + stride + i + j;
          write(sum, read(sum) + dx[j] * to_float(x.v[j]));
        }
      }
      if (a.layer_scale) dx[j] *= scale.v[j];
    }
    if (a.dresidual) store(static_cast<R*>(a.dresidual) + row + i, from_floats<R>(total));
    store(static_cast<X*>(a.dx) + row + i, from_floats<X>(dx));
  });
}

template <class X, class R, int N, int K>
__global__ void __launch_bounds__(kRowThreads<K>) bwd_kernel(const AddRmsNormBwd a) {
  // rows take turns with the two
  IV2_SHARED(float, part, [2][1][kMaxWarps]);
  const int64_t chunk = blockIdx.x, chunks = gridDim.x, stride = chunks * a.dim;
  float* sums = a.scratch + chunk * a.dim;
  float dweight[K > 0 ? K : 1][N] = {}, dscale[K > 0 ? K : 1][N] = {};
  const auto store_sums = [&] {
    for_packs<N, K>(a.dim, [&](int64_t i, int k) {
      Pack<float, N> pack;
#pragma unroll
      for (int j = 0; j < N; ++j) pack.v[j] = dweight[k][j];
      store(sums + i, pack);
      if (a.dlayer_scale == nullptr) return;
#pragma unroll
      for (int j = 0; j < N; ++j) pack.v[j] = dscale[k][j];
      store(sums + stride + i, pack);
    });
  };
  if (K == 0) store_sums();
  for (int64_t m = a.rows * chunk / chunks; m < a.rows * (chunk + 1) / chunks; ++m) {
    bwd_row<X, R, N, K>(a, m, part[m % 2], sums, stride, dweight, dscale);
  }
  if (K > 0) store_sums();
}

// f(X{}, R{}, N, K) for the kernel that takes these dtypes and rows: packs for equal dtypes and for
// a residual stream in float32, else elements.
template <class F>
int by_shape(int64_t x_dtype, int64_t r_dtype, int64_t dim, bool aligned, F f) {
  return by_dtype(x_dtype, [&](auto x) {
    return by_dtype(r_dtype, [&](auto r) {
      using X = decltype(x);
      using R = decltype(r);
      constexpr int size = pack_size<X, R>;
      constexpr bool usual = std::is_same_v<X, R> || std::is_same_v<R, float>;
      const RowShape shape = row_shape(dim, size, aligned && usual);
      if constexpr (usual) {
        if (shape.packs == 1) return f(x, r, Int<size>{}, Int<1>{}, shape.threads);
        if (shape.packs == 2) return f(x, r, Int<size>{}, Int<2>{}, shape.threads);
      }
      return f(x, r, Int<1>{}, Int<0>{}, shape.threads);
    });
  });
}

}  // namespace

int add_rms_norm_fwd(const AddRmsNormFwd& a, Stream stream) {
  const bool aligned = all_aligned(a.x, a.residual, a.weight, a.layer_scale, a.y, a.r);
  return by_shape(a.x_dtype, a.r_dtype, a.dim, aligned,
                  [&](auto x, auto r, auto n, auto k, unsigned threads) {
                    return launch(fwd_kernel<decltype(x), decltype(r), n.value, k.value>,
                                  dim3(static_cast<unsigned>(a.rows)), dim3(threads), 0, stream, a);
                  });
}

int add_rms_norm_bwd(const AddRmsNormBwd& a, Stream stream) {
  const int64_t chunks = cuda_row_chunks(a.rows);
  const bool aligned =
      all_aligned(a.dy, a.dr, a.x, a.r, a.weight, a.layer_scale, a.dx, a.dresidual, a.scratch);
  const int error = by_shape(
      a.x_dtype, a.r_dtype, a.dim, aligned, [&](auto x, auto r, auto n, auto k, unsigned threads) {
        return launch(bwd_kernel<decltype(x), decltype(r), n.value, k.value>,
                      dim3(static_cast<unsigned>(chunks)), dim3(threads), 0, stream, a);
      });
  if (error != 0) return error;
  return sum_chunks(a.scratch, chunks, a.dim, a.dweight, a.dlayer_scale, stream);
}

}  // namespace iv2::cuda
