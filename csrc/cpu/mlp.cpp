// mlp.cpp - the GELU between the two GEMMs of an mlp, and on the way back gelu(z) again, the
// gradient of z and that of the first bias, in one pass over z and the gradient of gelu(z).
//
// Both forms of GELU are z times a distribution function: the logistic one of 2 u(z) for "tanh",
// the normal one for erf. In float32; elementwise, in rows, rows in parallel and the bias's sum in
// fixed chunks (kernels.h). Bound by memory in bfloat16 and by the exponential in float32.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

// gelu(z) = z cdf and gelu'(z) = cdf + z slope.
struct Gelu {
  Vec cdf, slope;
};

template <int n>
inline Vec polynomial(Vec x, const float (&c)[n]) {  // c[0] + c[1] x + ...
  Vec p = set(c[n - 1]);
  for (int k = n - 2; k >= 0; --k) p = fma(p, x, set(c[k]));
  return p;
}

// 0.5 (1 + tanh u) = 1 / (1 + e^-2u) with u = sqrt(2/pi) (z + 0.044715 z^3).
inline Gelu gelu_tanh(Vec z) {
  const float k = 2 * 0.79788456080286536f, cube = 0.044715f;
  z = min(max(z, set(-10.f)), set(10.f));  // beyond, the exponential would overflow
  const Vec squared = mul(z, z);
  const Vec minus_2u = mul(mul(set(-k), z), fma(squared, set(cube), set(1.f)));
  const Vec e = exp(minus_2u), cdf = div(set(1.f), add(set(1.f), e));
  const Vec derivative = fma(squared, set(3 * cube * k), set(k));  // of 2u
  return {cdf, mul(mul(cdf, mul(cdf, e)), derivative)};
}

// The normal distribution function P. Near 0: 1/2 + z p(z^2), p fitted to 4e-10 of its size. From
// 1.3 on: P(-z) = e^(-z^2/2) v q(v) with v = 1 / (1 + z/4), fitted to 8e-10.
constexpr float kNear[] = {3.9894228025e-1f, -6.6490371226e-2f, 9.9734742681e-3f, -1.1870352257e-3f,
                           1.1493553121e-4f, -9.0009911331e-6f, 4.6334130872e-7f};
constexpr float kFar[] = {1.0317289778e-1f, 6.7049956198e-2f, 2.1614473949e-1f, -1.4444892741e-1f,
                          2.5826586058e-1f};

inline Gelu gelu_erf(Vec z) {
  z = min(max(z, set(-14.f)), set(14.f));
  const Vec magnitude = copy_sign(z, set(1.f)), squared = mul(z, z);
  const Vec e = exp(mul(squared, set(-0.5f)));
  const Vec v = div(set(1.f), fma(magnitude, set(0.25f), set(1.f)));
  const Vec tail = mul(e, mul(v, polynomial(v, kFar)));
  const Vec outer = pick_less(z, set(0), tail, sub(set(1.f), tail));
  const Vec inner = fma(z, polynomial(squared, kNear), set(0.5f));
  return {pick_less(magnitude, set(1.3f), inner, outer), mul(e, set(0.398942280401432678f))};
}

template <bool kTanh>
inline Gelu gelu(Vec z) {
  return kTanh ? gelu_tanh(z) : gelu_erf(z);
}

template <bool kTanh, class T>
void fwd(const MlpFwd& args) {
  for_row_chunks(args.rows, args.threads, [&](int64_t, int64_t begin, int64_t end) {
    const T* z = static_cast<const T*>(args.z) + begin * args.dim;
    T* a = static_cast<T*>(args.a) + begin * args.dim;
    for_each_vec((end - begin) * args.dim, [&](int64_t i, int64_t n) {
      const Vec value = load_at(z, i, n);
      store_at(a, mul(value, gelu<kTanh>(value).cdf), i, n);
    });
  });
}

template <bool kTanh, class T>
void bwd(const MlpBwd& args) {
  const int64_t dim = args.dim, chunks = row_chunks(args.rows);
  for_row_chunks(args.rows, args.threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* dbias = args.scratch + chunk * dim;
    for_each_vec(dim, [&](int64_t i, int64_t n) { store_at(dbias, set(0), i, n); });
    for (int64_t m = begin; m < end; ++m) {
      const T* z = static_cast<const T*>(args.z) + m * dim;
      T* a = args.a ? static_cast<T*>(args.a) + m * dim : nullptr;
      T* dz = static_cast<T*>(args.dz) + m * dim;
      for_each_vec(dim, [&](int64_t i, int64_t n) {
        const Vec value = load_at(z, i, n);
        const Gelu g = gelu<kTanh>(value);
        if (a) store_at(a, mul(value, g.cdf), i, n);
        const Vec gradient = mul(load_at(dz, i, n), fma(value, g.slope, g.cdf));
        store_at(dz, gradient, i, n);
        store_at(dbias, add(load_at(dbias, i, n), gradient), i, n);
      });
    }
  });
  add_chunks(args.scratch, chunks, dim, args.dbias);
}

}  // namespace

void mlp_fwd(const MlpFwd& a) {
  by_dtype(a.dtype, [&](auto type) {
    a.is_tanh ? fwd<true, decltype(type)>(a) : fwd<false, decltype(type)>(a);
  });
}

void mlp_bwd(const MlpBwd& a) {
  by_dtype(a.dtype, [&](auto type) {
    a.is_tanh ? bwd<true, decltype(type)>(a) : bwd<false, decltype(type)>(a);
  });
}

}  // namespace iv2::IV2_ISA
