// patch_embed.cpp - what surrounds the GEMM of the patch embedding, for the visible tokens only.
//
// `patch_embed_gather` copies tubelets to rows in the order of the weight (channel, time, row,
// column), bytes through a table of their 256 normalised values; the CLS row of a sample is zero,
// so that the GEMM's output already has a place for it. `patch_embed_add` then adds bias and
// position in place and writes the CLS row. `patch_embed_bwd` sums rows, in fixed chunks
// (kernels.h). One row at a time, rows in parallel, each tensor read or written once: bound by
// memory.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

// The first pixel of tubelet `id` of a sample, in elements from the sample's first.
int64_t origin(const PatchEmbedGather& a, int64_t id) {
  const int64_t column = id % a.grid_w, row = id / a.grid_w % a.grid_h;
  const int64_t frame = id / (a.grid_w * a.grid_h);
  return frame * a.tubelet * a.video_t + row * a.patch * a.video_h + column * a.patch * a.video_w;
}

template <class T>
void copy_bytes(const PatchEmbedGather& a, const uint8_t* video, T* out) {
  const T *red = static_cast<const T*>(a.table), *green = red + 256, *blue = green + 256;
  const int64_t plane = a.tubelet * a.patch * a.patch;
  for (int64_t t = 0; t < a.tubelet; ++t) {
    for (int64_t h = 0; h < a.patch; ++h) {
      const uint8_t* pixel = video + t * a.video_t + h * a.video_h;
      for (int64_t w = 0; w < a.patch; ++w, pixel += 3, ++out) {
        out[0] = red[pixel[0]];
        out[plane] = green[pixel[1]];
        out[2 * plane] = blue[pixel[2]];
      }
    }
  }
}

template <class V, class T>
void copy_floats(const PatchEmbedGather& a, const V* video, T* out) {
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t t = 0; t < a.tubelet; ++t) {
      for (int64_t h = 0; h < a.patch; ++h, out += a.patch) {
        const V* pixels = video + c * a.video_c + t * a.video_t + h * a.video_h;
        for_each_vec(a.patch,
                     [&](int64_t i, int64_t n) { store_at(out, load_at(pixels, i, n), i, n); });
      }
    }
  }
}

inline void copy(const PatchEmbedGather& a, const uint8_t* video, float* out) {
  copy_bytes(a, video, out);
}
inline void copy(const PatchEmbedGather& a, const uint8_t* video, bf16* out) {
  copy_bytes(a, video, out);
}
template <class V, class T>
void copy(const PatchEmbedGather& a, const V* video, T* out) {
  copy_floats(a, video, out);
}

template <class V, class T>
void gather(const PatchEmbedGather& a) {
  const int64_t depth = 3 * a.tubelet * a.patch * a.patch, rows = a.first + a.keep;
  for_row_chunks(a.batch * rows, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t sample = m / rows, token = m % rows - a.first;
      T* out = static_cast<T*>(a.patches) + m * depth;
      if (token < 0) {
        memset(out, 0, static_cast<size_t>(depth) * sizeof(T));
        continue;
      }
      const int64_t id = a.ids ? a.ids[sample * a.keep + token] : token;
      copy(a, static_cast<const V*>(a.video) + sample * a.video_b + origin(a, id), out);
    }
  });
}

// f(T{}) for what a GEMM multiplies: fp16 goes through fp32.
template <class F>
void by_gemm_dtype(int64_t dtype, F f) {
  if (dtype == kBFloat16)
    f(bf16{});
  else
    f(float{});
}

template <class Y, class Out, class Pos>
void add_rows(const PatchEmbedAdd& a) {
  const int64_t rows = a.first + a.keep;
  for_row_chunks(a.batch * rows, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t sample = m / rows, token = m % rows - a.first;
      const int64_t id = token < 0 || a.ids == nullptr ? token : a.ids[sample * a.keep + token];
      const Y* y = static_cast<const Y*>(a.y) + m * a.dim;
      const Pos* position = static_cast<const Pos*>(a.pos_embed) + (a.first + id) * a.dim;
      Out* out = static_cast<Out*>(a.out) + m * a.dim;
      for_each_vec(a.dim, [&](int64_t i, int64_t n) {
        Vec total = token < 0 ? load_at(a.cls_token, i, n) : load_at(y, i, n);
        if (a.bias && token >= 0) total = add(total, load_at(a.bias, i, n));
        if (a.pos_embed) total = add(total, load_at(position, i, n));
        store_at(out, total, i, n);
      });
    }
  });
}

// dbias: the sum of the patch rows; dcls_token: of the CLS rows.
template <class T>
void bwd(const PatchEmbedBwd& a) {
  const int64_t dim = a.dim, rows = a.batch * a.keep;
  const T* dy = static_cast<const T*>(a.dy);
  for_row_chunks(rows, a.threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* total = a.scratch + chunk * dim;
    for_each_vec(dim, [&](int64_t i, int64_t n) { store_at(total, set(0), i, n); });
    for (int64_t m = begin; m < end; ++m) {
      const T* row = dy + (m / a.keep * (a.first + a.keep) + a.first + m % a.keep) * dim;
      for_each_vec(dim, [&](int64_t i, int64_t n) {
        store_at(total, add(load_at(total, i, n), load_at(row, i, n)), i, n);
      });
    }
  });
  add_chunks(a.scratch, row_chunks(rows), dim, a.dbias);
  if (a.dcls_token == nullptr) return;
  for_each_vec(dim, [&](int64_t i, int64_t n) {
    Vec total = set(0);
    for (int64_t b = 0; b < a.batch; ++b) {
      total = add(total, load_at(dy + b * (a.first + a.keep) * dim, i, n));
    }
    store_at(a.dcls_token, total, i, n);
  });
}

}  // namespace

void patch_embed_gather(const PatchEmbedGather& a) {
  by_gemm_dtype(a.dtype, [&](auto t) {
    if (a.video_dtype == kUInt8)
      gather<uint8_t, decltype(t)>(a);
    else
      by_dtype(a.video_dtype, [&](auto v) { gather<decltype(v), decltype(t)>(a); });
  });
}

void patch_embed_add(const PatchEmbedAdd& a) {
  by_dtype(a.pos_dtype, [&](auto pos) {
    if (a.dtype == kFloat32) add_rows<float, float, decltype(pos)>(a);
    if (a.dtype == kBFloat16) add_rows<bf16, bf16, decltype(pos)>(a);
    if (a.dtype == kFloat16) add_rows<float, f16, decltype(pos)>(a);
  });
}

void patch_embed_bwd(const PatchEmbedBwd& a) {
  by_dtype(a.dtype, [&](auto t) { bwd<decltype(t)>(a); });
}

}  // namespace iv2::IV2_ISA
