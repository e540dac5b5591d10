// patch_embed.cu - what surrounds the GEMM of the patch embedding, for the visible tokens only.
//
// `patch_embed_gather` gives a row of tubelets to a block. Of bytes a thread takes some pixels,
// looks their three normalised values up in a table that L1 holds, and writes to three planes; a
// line of pixels is read byte by byte, but from L1 after its first. Of floats a thread takes
// neighbours on a line. The CLS row of a sample is zero, so that the GEMM's output already has a
// place for it. `patch_embed_add` adds bias and position in place and writes the CLS row, a block a
// row. `patch_embed_bwd` sums rows in chunks, a block a chunk, and the CLS rows in one block more.
// Bound by memory: each tensor is read or written once. An id out of range gives a row of NaN.
#include "pack.cuh"
#include "reduce.cuh"

namespace iv2::cuda {
namespace {

constexpr unsigned kThreads = 256;

// A row of NaN or of zeros.
template <class T, int V>
__device__ __forceinline__ void fill(T* out, int64_t count, float value) {
  float all[V];
#pragma unroll
  for (int j = 0; j < V; ++j) all[j] = value;
  for_packs<V, 0>(count, [&](int64_t i, int) { store(out + i, from_floats<T>(all)); });
}

// What a block's row is made of: false if of no tubelet, and then it is filled here.
template <class T, int V>
__device__ __forceinline__ bool find_row(const PatchEmbedGather& a, int64_t depth, T*& out,
                                         int64_t& first_pixel) {
  const int64_t rows = a.first + a.keep, m = blockIdx.x, sample = m / rows;
  const int64_t token = m % rows - a.first, frame_tokens = a.grid_h * a.grid_w;
  out = static_cast<T*>(a.patches) + m * depth;
  const int64_t id =
      token < 0 || a.ids == nullptr ? token : read_cached(a.ids + sample * a.keep + token);
  if (token < 0 || id < 0 || id >= a.grid_t * frame_tokens) {
    fill<T, V>(out, depth, token < 0 ? 0.0f : float_from_bits(0x7FFFFFFFu));
    return false;
  }
  const int64_t frame = id / frame_tokens, row = id / a.grid_w % a.grid_h, column = id % a.grid_w;
  first_pixel = sample * a.video_b + frame * a.tubelet * a.video_t + row * a.patch * a.video_h +
                column * a.patch * a.video_w;
  return true;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) bytes_kernel(const PatchEmbedGather a) {
  const int patch = static_cast<int>(a.patch);
  const int plane = static_cast<int>(a.tubelet) * patch * patch;
  T* out;
  int64_t first_pixel;
  if (!find_row<T, V>(a, 3 * int64_t{plane}, out, first_pixel)) return;
  const uint8_t* video = static_cast<const uint8_t*>(a.video) + first_pixel;
  const T* table = static_cast<const T*>(a.table);
  for_packs<V, 0>(plane, [&](int64_t i, int) {
    Pack<T, V> colours[3];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int at = static_cast<int>(i) + j, line = at / patch;
      const uint8_t* pixel =
          video + line / patch * a.video_t + line % patch * a.video_h + at % patch * 3;
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        colours[c].v[j] = load_cached<1>(table + c * 256 + read_cached(pixel + c)).v[0];
      }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) store(out + c * plane + i, colours[c]);
  });
}

// V pixels at a time, which are neighbours: V divides the patch.
template <class P, class T, int V>
__global__ void __launch_bounds__(kThreads) floats_kernel(const PatchEmbedGather a) {
  const int patch = static_cast<int>(a.patch), tubelet = static_cast<int>(a.tubelet);
  const int depth = 3 * tubelet * patch * patch;
  T* out;
  int64_t first_pixel;
  if (!find_row<T, V>(a, depth, out, first_pixel)) return;
  const P* video = static_cast<const P*>(a.video) + first_pixel;
  for_packs<V, 0>(depth, [&](int64_t i, int) {
    const int at = static_cast<int>(i), line = at / patch, frame = line / patch;
    const P* pixels = video + frame / tubelet * a.video_c + frame % tubelet * a.video_t +
                      line % patch * a.video_h + at % patch;
    const Pack<P, V> pack = load<V>(pixels);
    float values[V];
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = to_float(pack.v[j]);
    store(out + i, from_floats<T>(values));
  });
}

template <class T, class Pos, int N>
__global__ void __launch_bounds__(kThreads) add_kernel(const PatchEmbedAdd a) {
  const int64_t rows = a.first + a.keep, m = blockIdx.x, sample = m / rows;
  const int64_t token = m % rows - a.first;
  const int64_t id =
      token < 0 || a.ids == nullptr ? token : read_cached(a.ids + sample * a.keep + token);
  T* out = static_cast<T*>(a.out) + m * a.dim;
  if (token >= 0 && (id < 0 || id >= a.tokens)) {
    fill<T, N>(out, a.dim, float_from_bits(0x7FFFFFFFu));
    return;
  }
  const T* y = static_cast<const T*>(a.y) + m * a.dim;
  const Pos* position = static_cast<const Pos*>(a.pos_embed) + (a.first + id) * a.dim;
  for_packs<N, 0>(a.dim, [&](int64_t i, int) {
    float sum[N];
    if (token < 0) {
      const Pack<float, N> cls = load_cached<N>(a.cls_token + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = cls.v[j];
    } else {
      const Pack<T, N> row = load<N>(y + i);
      Pack<float, N> bias;
      if (a.bias) bias = load_cached<N>(a.bias + i);
#pragma unroll
      for (int j = 0; j < N; ++j)
        sum[j] = a.bias ? to_float(row.v[j]) + bias.v[j] : to_float(row.v[j]);
    }
    if (a.pos_embed) {
      const Pack<Pos, N> added = load_cached<N>(position + i);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += to_float(added.v[j]);
    }
    store(out + i, from_floats<T>(sum));
  });
}

// A slab of columns, blockIdx.y, of the rows of a chunk, or in one block more of the CLS rows.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) bwd_kernel(const PatchEmbedBwd a, int64_t chunks) {
  const int64_t i = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  if (i >= a.dim) return;
  const int64_t chunk = blockIdx.x, rows = a.batch * a.keep, all = a.first + a.keep;
  const bool is_cls = chunk == chunks;
  const int64_t begin = is_cls ? 0 : rows * chunk / chunks;
  const int64_t end = is_cls ? a.batch : rows * (chunk + 1) / chunks;
  Pack<float, N> total = {};
  for (int64_t m = begin; m < end; ++m) {
    const int64_t row = is_cls ? m * all : m / a.keep * all + a.first + m % a.keep;
    const Pack<T, N> dy = load<N>(static_cast<const T*>(a.dy) + row * a.dim + i);
#pragma unroll
    for (int j = 0; j < N; ++j) total.v[j] += to_float(dy.v[j]);
  }
  store(is_cls ? a.dcls_token + i : a.scratch + chunk * a.dim + i, total);
}

template <class P, class T>
int gather_floats(const PatchEmbedGather& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(a.batch * (a.first + a.keep))), block(kThreads);
  const int64_t strides[] = {a.patch, a.video_b, a.video_c, a.video_t, a.video_h};
  bool by_four = all_aligned(a.video, a.patches), by_two = by_four;
  for (int64_t stride : strides) {
    by_four = by_four && stride % 4 == 0;
    by_two = by_two && stride % 2 == 0;
  }
  if (by_four) return launch(floats_kernel<P, T, 4>, grid, block, 0, stream, a);
  if (by_two) return launch(floats_kernel<P, T, 2>, grid, block, 0, stream, a);
  return launch(floats_kernel<P, T, 1>, grid, block, 0, stream, a);
}

}  // namespace

int patch_embed_gather(const PatchEmbedGather& a, Stream stream) {
  return by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (a.video_dtype != kUInt8) {
      return by_dtype(a.video_dtype,
                      [&](auto p) { return gather_floats<decltype(p), T>(a, stream); });
    }
    const dim3 grid(static_cast<unsigned>(a.batch * (a.first + a.keep)));
    const int64_t plane = a.tubelet * a.patch * a.patch;
    const dim3 block(static_cast<unsigned>(plane < 512 ? 64 : kThreads));
    if (plane % 4 == 0 && all_aligned(a.patches)) {
      return launch(bytes_kernel<T, 4>, grid, block, 0, stream, a);
    }
    return launch(bytes_kernel<T, 1>, grid, block, 0, stream, a);
  });
}

int patch_embed_add(const PatchEmbedAdd& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(a.batch * (a.first + a.keep)));
  const bool aligned = all_aligned(a.y, a.bias, a.pos_embed, a.cls_token, a.out);
  return by_dtype(a.dtype, [&](auto t) {
    return by_dtype(a.pos_dtype, [&](auto pos) {
      using T = decltype(t);
      using Pos = decltype(pos);
      constexpr int size = pack_size<T, Pos>;
      const int64_t threads = (a.dim / size + 31) / 32 * 32;
      if (aligned && a.dim % size == 0) {
        const dim3 block(static_cast<unsigned>(threads < kThreads ? threads : kThreads));
        return launch(add_kernel<T, Pos, size>, grid, block, 0, stream, a);
      }
      return launch(add_kernel<T, Pos, 1>, grid, dim3(kThreads), 0, stream, a);
    });
  });
}

int patch_embed_bwd(const PatchEmbedBwd& a, Stream stream) {
  const int64_t rows = a.batch * a.keep, chunks = cuda_row_chunks(rows);
  const int error = by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int size = 16 / sizeof(T);
    const bool whole = a.dim % size == 0 && all_aligned(a.dy, a.scratch, a.dcls_token);
    const int64_t packs = whole ? a.dim / size : a.dim;
    const dim3 block(static_cast<unsigned>(packs < kThreads ? (packs + 31) / 32 * 32 : kThreads));
    const dim3 grid(static_cast<unsigned>(a.dcls_token ? chunks + 1 : chunks),
                    static_cast<unsigned>((packs + block.x - 1) / block.x));
    if (whole) return launch(bwd_kernel<T, size>, grid, block, 0, stream, a, chunks);
    return launch(bwd_kernel<T, 1>, grid, block, 0, stream, a, chunks);
  });
  if (error != 0) return error;
  return sum_chunks(a.scratch, chunks, a.dim, a.dbias, nullptr, stream);
}

}  // namespace iv2::cuda
