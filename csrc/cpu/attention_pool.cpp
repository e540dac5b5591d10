// attention_pool.cpp - pooling by a few queries a sample, over layer-normalised tokens that are
// never stored: xhat = (x - mean) rstd, S = q.xhat, p = softmax over the tokens, z = p xhat.
//
// What depends on a token and a head (S, p, their gradients) is kept as [B, N, lanes], heads in the
// lanes of vectors, so that softmax needs no sum across lanes. Three products, each on fixed tasks:
//   project: eight tokens times all heads, against the transposed queries, over the width
//   weigh:   a block of columns for all heads, over all tokens of a sample
//   spread:  eight tokens, a vector of columns at a time, over the heads; ends in LayerNorm's
//            backward, whose two means follow from what project has found
// Forward is project (with the statistics of its tokens), softmax, weigh; backward is project (of
// dz), spread for dx, weigh for dquery. x is read twice, from the cache the second time; bound by
// the multiplications, 4 heads a value forward and 8 backward.
#include "../kernels.h"
#include "vec.h"

namespace iv2::IV2_ISA {
namespace {

constexpr int64_t kRows = 8;       // tokens in registers
constexpr int64_t kDepth = 64;     // of the width, between two additions to a sum in memory
constexpr int64_t kColumns = 128;  // of a task of weigh
constexpr int64_t kGroup = 16;     // heads of weigh at a time

template <class X>
struct Tokens {
  const X* x;          // [N, C]
  float *mean, *rstd;  // [N]
  int64_t tokens, dim;

  // A block may hang over the end: the last token again.
  int64_t at(int64_t n) const { return min_of(n, tokens - 1); }

  void measure(int64_t n, float eps) const {
    const X* row = x + n * dim;
    const float count = static_cast<float>(dim);
    Vec total = set(0), squares = set(0);
    for_each_vec(dim, [&](int64_t i, int64_t k) { total = add(total, load_at(row, i, k)); });
    mean[n] = sum(total) / count;
    for_each_vec(dim, [&](int64_t i, int64_t k) {
      const Vec centred = keep_first(sub(load_at(row, i, k), set(mean[n])), k);
      squares = fma(centred, centred, squares);
    });
    rstd[n] = 1.0f / __builtin_sqrtf(sum(squares) / count + eps);
  }
};

// out[n, h] = xhat[n] . matrix[h] for eight tokens from n0; transposed is [C, lanes].
template <class X>
void project(const Tokens<X>& t, int64_t n0, const float* transposed, int64_t lanes, float* out) {
  float xhat[kRows * kDepth];
  for (int64_t k0 = 0; k0 < t.dim; k0 += kDepth) {
    const int64_t depth = min_of(kDepth, t.dim - k0);
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t n = t.at(n0 + r);
      for_each_vec(depth, [&](int64_t i, int64_t k) {
        const Vec centred = sub(load_at(t.x + n * t.dim + k0, i, k), set(t.mean[n]));
        store_at(xhat + r * kDepth, mul(centred, set(t.rstd[n])), i, k);
      });
    }
    for (int64_t lane = 0; lane < lanes; lane += Vec::size) {
      Vec total[kRows];
      for (int64_t r = 0; r < kRows; ++r) total[r] = set(0);
      const float* column = transposed + k0 * lanes + lane;
      for (int64_t i = 0; i < depth; ++i) {
        const Vec q = load(column + i * lanes);
        for (int64_t r = 0; r < kRows; ++r) total[r] = fma(set(xhat[r * kDepth + i]), q, total[r]);
      }
      for (int64_t r = 0; r < kRows && n0 + r < t.tokens; ++r) {
        float* to = out + (n0 + r) * lanes + lane;
        store(to, k0 == 0 ? total[r] : add(load(to), total[r]));
      }
    }
  }
}

// out[h, c] = sum over n of weights[n, h] xhat[n, c], for kColumns columns from c0.
template <class X, class Y>
void weigh(const Tokens<X>& t, int64_t c0, const float* weights, int64_t heads, int64_t lanes,
           Y* out) {
  const int64_t columns = min_of(kColumns, t.dim - c0);
  float sums[kGroup * kColumns];
  for (int64_t lane = 0; lane < heads; lane += kGroup) {
    const int64_t group = min_of(kGroup, heads - lane);
    for (int64_t i = 0; i < kGroup * kColumns; i += Vec::size) store(sums + i, set(0));
    for (int64_t n0 = 0; n0 < t.tokens; n0 += kRows) {
      float w[kGroup * kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t n = t.at(n0 + r);
        const float scale = n0 + r < t.tokens ? t.rstd[n] : 0.0f;
        for (int64_t h = 0; h < group; ++h)
          w[h * kRows + r] = weights[n * lanes + lane + h] * scale;
      }
      for_each_vec(columns, [&](int64_t i, int64_t k) {
        Vec centred[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t n = t.at(n0 + r);
          centred[r] = sub(load_at(t.x + n * t.dim + c0, i, k), set(t.mean[n]));
        }
        for (int64_t h = 0; h < group; ++h) {
          Vec even = set(0), odd = set(0);
          for (int64_t r = 0; r < kRows; r += 2) {
            even = fma(set(w[h * kRows + r]), centred[r], even);
            odd = fma(set(w[h * kRows + r + 1]), centred[r + 1], odd);
          }
          float* to = sums + h * kColumns + i;
          store(to, add(load(to), add(even, odd)));
        }
      });
    }
    for (int64_t h = 0; h < group; ++h) {
      Y* to = out + (lane + h) * t.dim + c0;
      for_each_vec(columns, [&](int64_t i, int64_t k) {
        store_at(to, load_at(sums + h * kColumns, i, k), i, k);
      });
    }
  }
}

// [heads, C] to [C, lanes], zeros in the lanes without a head.
void transpose(const float* matrix, int64_t heads, int64_t lanes, int64_t dim, float* out) {
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t h = 0; h < heads; ++h) out[c * lanes + h] = matrix[h * dim + c];
    for (int64_t h = heads; h < lanes; ++h) out[c * lanes + h] = 0;
  }
}

struct Sizes {
  int64_t tokens, heads, lanes, dim;
};

// The sum over tokens of term(n), in parts: one running sum would lose digits over 2049 tokens.
template <class Term>
inline Vec sum_tokens(int64_t tokens, Term term) {
  Vec total = set(0);
  for (int64_t n0 = 0; n0 < tokens; n0 += 32) {
    Vec part = set(0);
    for (int64_t n = n0; n < min_of(n0 + 32, tokens); ++n) part = add(part, term(n));
    total = add(total, part);
  }
  return total;
}

// p = softmax over the tokens of logits [N, lanes], and its mean over heads.
void softmax(const Sizes& size, const float* logits, float* p, float* probs) {
  const int64_t lanes = size.lanes;
  for (int64_t lane = 0; lane < lanes; lane += Vec::size) {
    Vec top = load(logits + lane);
    for (int64_t n = 1; n < size.tokens; ++n) top = max(top, load(logits + n * lanes + lane));
    const Vec total = sum_tokens(size.tokens, [&](int64_t n) {
      const Vec e = exp(sub(load(logits + n * lanes + lane), top));
      store(p + n * lanes + lane, e);
      return e;
    });
    const Vec inverse = div(set(1), total);
    for (int64_t n = 0; n < size.tokens; ++n) {
      store(p + n * lanes + lane, mul(load(p + n * lanes + lane), inverse));
    }
  }
  for (int64_t n = 0; n < size.tokens; ++n) {
    Vec total = set(0);
    for_each_vec(size.heads,
                 [&](int64_t i, int64_t k) { total = add(total, load_at(p + n * lanes, i, k)); });
    probs[n] = sum(total) / static_cast<float>(size.heads);
  }
}

// [heads]: the sums of the rows of a [heads, C] matrix.
void sum_rows(const float* matrix, const Sizes& size, float* out) {
  for (int64_t lane = 0; lane < size.lanes; ++lane) out[lane] = 0;
  for (int64_t h = 0; h < size.heads; ++h) {
    Vec total = set(0);
    for_each_vec(size.dim, [&](int64_t i, int64_t k) {
      total = add(total, load_at(matrix + h * size.dim, i, k));
    });
    out[h] = sum(total);
  }
}

// From dp, the gradient of p, that of the logits, in place; and the two means of LayerNorm's
// backward: with g = sum over h of p_h dz_h + dS_h q_h, those of g and of g xhat.
void softmax_bwd(const Sizes& size, const float* logits, const float* p, const float* dz_sums,
                 const float* query_sums, float* dp, float* mean, float* mean_xhat, float* delta) {
  const int64_t lanes = size.lanes;
  for (int64_t lane = 0; lane < lanes; lane += Vec::size) {
    const Vec total = sum_tokens(size.tokens, [&](int64_t n) {
      return mul(load(p + n * lanes + lane), load(dp + n * lanes + lane));
    });
    store(delta + lane, total);
  }
  for (int64_t n = 0; n < size.tokens; ++n) {
    Vec plain = set(0), with_xhat = set(0);
    for (int64_t lane = 0; lane < lanes; lane += Vec::size) {
      const int64_t at = n * lanes + lane;
      const Vec gradient = mul(load(p + at), sub(load(dp + at), load(delta + lane)));
      plain = fma(load(p + at), load(dz_sums + lane), plain);
      plain = fma(gradient, load(query_sums + lane), plain);
      with_xhat = fma(load(p + at), load(dp + at), with_xhat);
      with_xhat = fma(gradient, load(logits + at), with_xhat);
      store(dp + at, gradient);
    }
    mean[n] = sum(plain) / static_cast<float>(size.dim);
    mean_xhat[n] = sum(with_xhat) / static_cast<float>(size.dim);
  }
}

// dx of eight tokens from n0.
template <class X>
void spread(const Tokens<X>& t, int64_t n0, const Sizes& size, const float* p, const float* ds,
            const float* dz, const float* query, const float* mean, const float* mean_xhat, X* dx) {
  const int64_t rows = min_of(kRows, t.tokens - n0);
  const float *p_row[kRows], *ds_row[kRows];
  for (int64_t r = 0; r < kRows; ++r) {
    p_row[r] = p + t.at(n0 + r) * size.lanes;
    ds_row[r] = ds + t.at(n0 + r) * size.lanes;
  }
  for_each_vec(size.dim, [&](int64_t i, int64_t k) {
    Vec total[kRows];
    for (int64_t r = 0; r < kRows; ++r) total[r] = set(-mean[t.at(n0 + r)]);
    for (int64_t h = 0; h < size.heads; ++h) {
      const Vec dz_h = load_at(dz + h * size.dim, i, k), q_h = load_at(query + h * size.dim, i, k);
      for (int64_t r = 0; r < kRows; ++r) {
        total[r] = fma(set(p_row[r][h]), dz_h, total[r]);
        total[r] = fma(set(ds_row[r][h]), q_h, total[r]);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = n0 + r;
      const Vec centred = sub(load_at(t.x + n * t.dim, i, k), set(t.mean[n]));
      const Vec along = mul(mul(centred, set(t.rstd[n])), set(mean_xhat[n]));
      store_at(dx + n * t.dim, mul(set(t.rstd[n]), sub(total[r], along)), i, k);
    }
  });
}

template <class X, class Args>
Tokens<X> tokens_of(const Args& a, int64_t b) {
  return {static_cast<const X*>(a.x) + b * a.tokens * a.dim, a.mean + b * a.tokens,
          a.rstd + b * a.tokens, a.tokens, a.dim};
}

// body(b, n0) over blocks of tokens, body(b, c0) over blocks of columns.
template <class Body>
void for_blocks(int64_t batch, int64_t size, int64_t block, int64_t threads, Body body) {
  const int64_t blocks = (size + block - 1) / block;
  parallel_for(batch * blocks, threads,
               [&](int64_t task) { body(task / blocks, task % blocks * block); });
}

template <class X>
void fwd(const AttentionPoolFwd& a) {
  const Sizes size = {a.tokens, a.heads, a.lanes, a.dim};
  const int64_t values = a.tokens * a.lanes;  // of logits and of p, in a sample
  parallel_for(a.batch, a.threads, [&](int64_t b) {
    transpose(a.query + b * a.heads * a.dim, a.heads, a.lanes, a.dim,
              a.transposed + b * a.dim * a.lanes);
  });
  for_blocks(a.batch, a.tokens, kRows, a.threads, [&](int64_t b, int64_t n0) {
    const Tokens<X> t = tokens_of<X>(a, b);
    for (int64_t n = n0; n < min_of(n0 + kRows, a.tokens); ++n) {
      t.measure(n, static_cast<float>(a.eps));
    }
    project(t, n0, a.transposed + b * a.dim * a.lanes, a.lanes, a.logits + b * values);
  });
  parallel_for(a.batch, a.threads, [&](int64_t b) {
    softmax(size, a.logits + b * values, a.p + b * values, a.probs + b * a.tokens);
  });
  for_blocks(a.batch, a.dim, kColumns, a.threads, [&](int64_t b, int64_t c0) {
    weigh(tokens_of<X>(a, b), c0, a.p + b * values, a.heads, a.lanes,
          static_cast<X*>(a.z) + b * a.heads * a.dim);
  });
}

template <class X>
void bwd(const AttentionPoolBwd& a) {
  const Sizes size = {a.tokens, a.heads, a.lanes, a.dim};
  const int64_t values = a.tokens * a.lanes, matrix = a.heads * a.dim;
  const int64_t rows = a.batch * a.tokens;
  parallel_for(a.batch, a.threads, [&](int64_t b) {
    transpose(a.dz + b * matrix, a.heads, a.lanes, a.dim, a.transposed + b * a.dim * a.lanes);
    sum_rows(a.dz + b * matrix, size, a.sums + 3 * b * a.lanes);
    sum_rows(a.query + b * matrix, size, a.sums + (3 * b + 1) * a.lanes);
  });
  for_blocks(a.batch, a.tokens, kRows, a.threads, [&](int64_t b, int64_t n0) {
    project(tokens_of<X>(a, b), n0, a.transposed + b * a.dim * a.lanes, a.lanes, a.dp + b * values);
  });
  parallel_for(a.batch, a.threads, [&](int64_t b) {
    const float* sums = a.sums + 3 * b * a.lanes;
    softmax_bwd(size, a.logits + b * values, a.p + b * values, sums, sums + a.lanes,
                a.dp + b * values, a.means + b * a.tokens, a.means + rows + b * a.tokens,
                a.sums + (3 * b + 2) * a.lanes);
  });
  if (a.dx) {
    for_blocks(a.batch, a.tokens, kRows, a.threads, [&](int64_t b, int64_t n0) {
      spread(tokens_of<X>(a, b), n0, size, a.p + b * values, a.dp + b * values, a.dz + b * matrix,
             a.query + b * matrix, a.means + b * a.tokens, a.means + rows + b * a.tokens,
             static_cast<X*>(a.dx) + b * a.tokens * a.dim);
    });
  }
  if (!a.dquery) return;
  for_blocks(a.batch, a.dim, kColumns, a.threads, [&](int64_t b, int64_t c0) {
    weigh(tokens_of<X>(a, b), c0, a.dp + b * values, a.heads, a.lanes, a.dquery + b * matrix);
  });
}

}  // namespace

void attention_pool_fwd(const AttentionPoolFwd& a) {
  by_dtype(a.dtype, [&](auto type) { fwd<decltype(type)>(a); });
}

void attention_pool_bwd(const AttentionPoolBwd& a) {
  by_dtype(a.dtype, [&](auto type) { bwd<decltype(type)>(a); });
}

}  // namespace iv2::IV2_ISA
