// resized_crop_normalize.cpp - crop, antialiased resize, flip, normalise and cast, from bytes to
// planes in one pass.
//
// An output row is made whole while it is in L1: the input rows under its filter are blended into
// one row of floats (contiguous, whole vectors), that row is resampled pixel by pixel (a pixel is
// red, green, blue and one lane to spare, in 16 bytes), and the result is split into planes, scaled
// and stored. Vertical first, because the horizontal step, the slow one, then runs once per output
// row. Filters are tables from Python: a first index and the weights of each output row or column;
// flipping reverses a table. Blocks of output rows are parallel. Bound by the horizontal step's
// multiply-adds, 16 bytes at a time.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;
typedef float Pixel __attribute__((vector_size(16)));

inline Pixel load_pixel(const float* p) {
  Pixel pixel;
  memcpy(&pixel, p, 16);
  return pixel;
}

// row[i] = the sum over the filter of output row y; i counts the crop's bytes.
void blend_rows(const ResizedCropNormalizeFwd& a, const uint8_t* frame, int64_t y, float* row) {
  const uint8_t* bytes = frame + a.y_first[y] * a.frames_h;
  const float* weights = a.y_weights + y * a.y_taps;
  for_each_vec(3 * a.crop_width, [&](int64_t i, int64_t n) {
    Vec total = mul(set(weights[0]), load_at(bytes + i, 0, n));
    for (int64_t k = 1; k < a.y_taps; ++k) {
      total = fma(set(weights[k]), load_at(bytes + k * a.frames_h + i, 0, n), total);
    }
    store_at(row, total, i, n);
  });
}

// pixels[x] = the sum over the filter of output column x. Reads one float after the row.
void resample_row(const ResizedCropNormalizeFwd& a, const float* row, float* pixels) {
  const float* weights = a.x_weights;
  for (int64_t x = 0; x < a.width; ++x, weights += a.x_taps) {
    const float* in = row + 3 * a.x_first[x];
    Pixel total = weights[0] * load_pixel(in);
    for (int64_t k = 1; k < a.x_taps; ++k) total += weights[k] * load_pixel(in + 3 * k);
    memcpy(pixels + 4 * x, &total, 16);
  }
}

inline float as_byte(float x) { return x < 0.0f ? 0.0f : x > 255.0f ? 255.0f : x; }

// Bytes, rounded to nearest even: the integer is in the low bits of 2^23 + x.
void store_row(const ResizedCropNormalizeFwd& a, int64_t t, int64_t y, const float* pixels, float*,
               uint8_t* out) {
  out += (t * a.height + y) * a.width * 3;
  for (int64_t x = 0; x < a.width; ++x)
    for (int64_t c = 0; c < 3; ++c)
      out[3 * x + c] = static_cast<uint8_t>(bits_of(as_byte(pixels[4 * x + c]) + 8388608.0f));
}

template <class T>
void store_row(const ResizedCropNormalizeFwd& a, int64_t t, int64_t y, const float* pixels,
               float* plane, T* out) {
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t x = 0; x < a.width; ++x) plane[x] = pixels[4 * x + c];
    T* to = out + ((c * a.frames + t) * a.height + y) * a.width;
    const Vec scale = set(a.scale_shift[c]), shift = set(a.scale_shift[3 + c]);
    for_each_vec(a.width, [&](int64_t i, int64_t n) {
      const Vec byte = min(max(load_at(plane, i, n), set(0.0f)), set(255.0f));
      store_at(to, fma(byte, scale, shift), i, n);
    });
  }
}

template <class T>
void fwd(const ResizedCropNormalizeFwd& a) {
  const int64_t blocks = (a.height + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(a.frames * blocks, a.threads, [&](int64_t task) {
    const int64_t t = task / blocks, first = task % blocks * kRowsPerTask;
    float* row = a.scratch + thread_index() * (3 * a.crop_width + 1 + 5 * a.width);
    float* pixels = row + 3 * a.crop_width + 1;
    float* plane = pixels + 4 * a.width;
    row[3 * a.crop_width] = 0.0f;
    for (int64_t y = first; y < min_of(first + kRowsPerTask, a.height); ++y) {
      blend_rows(a, a.pixels + t * a.frames_t, y, row);
      resample_row(a, row, pixels);
      store_row(a, t, y, pixels, plane, static_cast<T*>(a.out));
    }
  });
}

}  // namespace

void resized_crop_normalize_fwd(const ResizedCropNormalizeFwd& a) {
  if (a.dtype == kUInt8)
    fwd<uint8_t>(a);
  else
    by_dtype(a.dtype, [&](auto t) { fwd<decltype(t)>(a); });
}

}  // namespace iv2::IV2_ISA
