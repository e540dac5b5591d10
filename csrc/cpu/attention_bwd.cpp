// attention_bwd.cpp - the gradients of attention.cpp, without the score matrix.
//
// A task is one kv head of one sequence and a fixed chunk of its keys; for each block of keys it
// runs over the queries with S^T = k q^T recomputed from lse, so that P^T and dS^T come out as
// operands for dv and dk, and dS (the same words, read along columns) for dq. All sums are fp32 and
// stay in scratch; with several chunks dq is summed from their parts, in order. Long sequences are
// gone over twice, so that memory is constant: groups of key blocks over spans of queries for dk
// and dv, then spans of queries over all keys for dq; 7 products of matrices in place of 5. Bound
// by the multipliers. With lists, a tile runs over the part of each packed block that a run covers.
#include "../kernels.h"
#include "attention.h"

namespace iv2::IV2_ISA {
namespace {

struct BwdScratch {
  int64_t pad, k_stride, first;                    // the span begins at query `first`
  float *q_t, *q, *do_t, *d_o, *dq, *lse, *delta;  // of a span, in blocks of 64 queries
  float *dk, *dv;                                  // of one block of keys, or of several
  float *rows, *k_rows, *k, *v_rows;               // tiles of 64 rows
  float *p, *ds, *ds_pairs, *k_scale;
  BwdScratch(const AttentionBwd& a, int64_t group) : pad(attention_pad(a.head_dim)), first(0) {
    const int64_t q_size = attention_blocks(attention_span(a.q_len)) * kBlock;
    const bool is_long = attention_bwd_is_long(a.q_len, a.k_len, group);
    const int64_t k_blocks = is_long ? kAttentionGroup : group > 1 ? attention_blocks(a.k_len) : 1;
    const int64_t k_size = k_blocks * kBlock;
    k_stride = group > 1 ? pad : 0;
    float* s =
        a.scratch + thread_index() * attention_bwd_scratch(a.head_dim, a.q_len, a.k_len, group);
    q_t = take(s, q_size * pad), q = take(s, q_size * pad);
    do_t = take(s, q_size * pad), d_o = take(s, q_size * pad), dq = take(s, q_size * pad);
    lse = take(s, q_size), delta = take(s, q_size);
    dk = take(s, k_size * pad), dv = take(s, k_size * pad);
    rows = take(s, kBlock * pad), k_rows = take(s, kBlock * pad);
    k = take(s, kBlock * pad), v_rows = take(s, kBlock * pad);
    p = take(s, kBlock * kBlock), ds = take(s, kBlock * kBlock);
    ds_pairs = take(s, kBlock * kBlock), k_scale = take(s, kBlock);
  }
};

// Queries `w.first` to `end` and output gradients of one head, their lse (negated) and delta =
// sum(do o) - dlse; dq is cleared. Padded queries have probability zero.
template <class Words, class T>
void pack_queries(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t end,
                  const BwdScratch& w) {
  const Packer<Words> pack(a.head_dim);
  const int64_t lse_row =
      a.cu_seqlens_q ? head * a.total_q + s.q_token : (s.batch * a.heads + head) * a.q_len;
  for (int64_t first = w.first; first < end; first += kBlock) {
    const int64_t n = min_of(kBlock, end - first), n_padded = round_up(n, 32);
    const int64_t depth = words<Words>(a.head_dim), at = (first - w.first) * w.pad;
    pack.template queries<T>(a, s, head, first, n, n_padded, w.rows);
    transpose_words(w.rows, pack.ld, n_padded, depth, w.q_t + at, kBlock);
    stack_words<Words>(w.rows, pack.ld, n_padded, a.head_dim, w.q + at, w.pad);
    const int64_t token = (s.q_token + first) * a.heads + head, step = a.heads * a.head_dim;
    const T* d_o = static_cast<const T*>(a.d_o) + token * a.head_dim;
    const T* o = static_cast<const T*>(a.o) + token * a.head_dim;
    pack_rows<Words, T>(d_o, step, n, n_padded, a.head_dim, nullptr, nullptr, w.rows, pack.ld);
    transpose_words(w.rows, pack.ld, n_padded, depth, w.do_t + at, kBlock);
    stack_words<Words>(w.rows, pack.ld, n_padded, a.head_dim, w.d_o + at, w.pad);
    for (int64_t r = 0; r < kBlock; ++r) {
      Vec dot = set(0);
      if (r < n) {
        prefetch_row(o + (r + 8) * step, a.head_dim);
        for_each_vec(a.head_dim, [&](int64_t i, int64_t count) {
          dot = fma(load_at(d_o + r * step, i, count), load_at(o + r * step, i, count), dot);
        });
      }
      const int64_t row = lse_row + first + r;
      const float lse = r < n ? a.lse[row] : -kInfinity;
      w.lse[first - w.first + r] = lse == -kInfinity ? -kInfinity : -lse * kPerNat<Words>;
      w.delta[first - w.first + r] = sum(dot) - (r < n && a.dlse ? a.dlse[row] : 0.0f);
    }
    memset(w.dq + at, 0, static_cast<size_t>(kBlock * w.pad) * 4);
  }
}

// One tile of S^T = k q^T and dP^T = v do^T: which queries and keys, and their scalars.
struct ScoreTile {
  float *p, *ds, *ds_pairs;  // [keys, 64]: S^T and dP^T in, P^T and dS^T k_scale out
  const float *k_scale, *lse, *delta;
  int64_t keys;
  // Key j is seen by queries `hidden` + j * step to `visible`.
  int64_t hidden, step, visible;
};

template <class Words, int kVecs>
inline void score_row(const ScoreTile& t, int64_t j, Vec* p, Vec* ds) {
  const Vec scale = set(t.k_scale[j]), score_scale = set(t.k_scale[j] * kPerNat<Words>);
  const int64_t hidden = min_of(kBlock, t.hidden + j * t.step);
  const float *mask = keep_from(max_of<int64_t>(hidden, 0)), *below = keep_below(t.visible);
  for (int v = 0; v < kVecs; ++v) {
    const int64_t at = v * Vec::size;
    // Not a multiply-add: lse came from rounded scores, and the rounding must cancel.
    Vec y = add(mul(load(t.p + j * kBlock + at), score_scale), load(t.lse + at));
    if (hidden > 0) y = min(load(mask + at), y);
    if (t.visible < kVecs * Vec::size) y = min(load(below + at), y);
    p[v] = exp_of_score<Words>(y);
    ds[v] = mul(mul(p[v], scale), sub(load(t.ds + j * kBlock + at), load(t.delta + at)));
  }
}

// S^T to P^T and dP^T to dS^T, as words; dS^T a second time in pairs of keys for bf16.
template <class Words, int kVecs>
void score_gradients(const ScoreTile& t) {
  if constexpr (Words::per_word == 1) {
    for (int64_t j = 0; j < t.keys; ++j) {
      Vec p[kVecs], ds[kVecs];
      score_row<Words, kVecs>(t, j, p, ds);
      store_words<Words, kVecs>(t.p + j * kBlock, p);
      store_words<Words, kVecs>(t.ds + j * kBlock, ds);
    }
  } else {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < t.keys; j += 2) {
      for (int64_t i = j; i < j + 2; ++i) {
        Vec p[kVecs], ds[kVecs];
        if (i == t.keys) {
          for (int v = 0; v < kVecs; ++v) ds[v] = set(0);
        } else {
          score_row<Words, kVecs>(t, i, p, ds);
          store_words<Words, kVecs>(t.p + i * kBlock, p);
        }
        store_words<Words, kVecs>(t.ds + i * kBlock, ds);
      }
      for (int v = 0; v < kVecs; v += 2) {
        const __m512i even = _mm512_loadu_si512(t.ds + j * kBlock + v * 8);
        const __m512i odd = _mm512_loadu_si512(t.ds + (j + 1) * kBlock + v * 8);
        float* out = t.ds_pairs + j / 2 * kBlock + v * 16;
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
#endif
  }
}

template <class Words, int kVecs = kBlock / Vec::size>
inline void score_gradients_vecs(int64_t vecs, const ScoreTile& t) {
  if constexpr (kVecs > Words::per_word) {
    if (vecs < kVecs) {
      score_gradients_vecs<Words, kVecs - Words::per_word>(vecs, t);
      return;
    }
  }
  score_gradients<Words, kVecs>(t);
}

// What a pass adds to.
struct Sums {
  float *dk, *dv;  // of a tile, or null
  bool dq;         // of the span
};

// The packed keys of a tile and queries `from` to `end` of one block.
template <class Words>
void tile_gradients(const AttentionBwd& a, const Sequence& s, const Tile& tile, int64_t from,
                    int64_t end, const BwdScratch& w, const Sums& sums) {
  constexpr int64_t kStep = Vec::size * Words::per_word;
  const int64_t keys = tile.count, ld = round_up(words<Words>(a.head_dim), 16);
  const int64_t dim_vecs = (a.head_dim + Vec::size - 1) / Vec::size, pad = w.pad;
  const int64_t block = from / kBlock * kBlock, skip = (from - block) / kStep * kStep;
  const int64_t i = block + skip, queries = end - i, row = i - w.first;
  const int64_t vecs = round_up(queries, kStep) / Vec::size;
  const int64_t depth = words<Words>(a.head_dim), columns = (block - w.first) * pad + skip;
  const int64_t hidden = a.causal ? tile.first + s.unseen - i : from - i;
  multiply<Words>({w.k_rows, ld, w.q_t + columns, kBlock, w.p, kBlock, depth}, keys, vecs, false);
  multiply<Words>({w.v_rows, ld, w.do_t + columns, kBlock, w.ds, kBlock, depth}, keys, vecs, false);
  score_gradients_vecs<Words>(vecs, {w.p, w.ds, w.ds_pairs, w.k_scale, w.lse + row, w.delta + row,
                                     keys, hidden, a.causal ? 1 : 0, queries});
  const int64_t q_words = words<Words>(queries);
  const int64_t at = (block - w.first + skip / Words::per_word) * pad;
  if (sums.dk) {
    multiply<Words>({w.p, kBlock, w.d_o + at, pad, sums.dv, pad, q_words}, keys, dim_vecs, true);
    multiply<Words>({w.ds, kBlock, w.q + at, pad, sums.dk, pad, q_words}, keys, dim_vecs, true);
  }
  if (!sums.dq) return;
  const float* ds = Words::per_word == 1 ? w.ds : w.ds_pairs;
  multiply<Words, true>({ds, kBlock, w.k, pad, w.dq + row * pad, pad, words<Words>(keys)}, queries,
                        dim_vecs, true);
}

template <class T>
void store_rows(const float* src, int64_t ld, int64_t n, int64_t dim, T* dst, int64_t step) {
  for (int64_t r = 0; r < n; ++r) {
    for_each_vec(dim, [&](int64_t i, int64_t count) {
      store_at(dst + r * step, load(src + r * ld + i), i, count);
    });
  }
}

template <class T>
void store_key_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, int64_t j,
                         int64_t keys, const float* dk, const float* dv) {
  const int64_t pad = attention_pad(a.head_dim), at = kv_head * a.head_dim;
  const int64_t token = s.k_token + j;
  store_rows(dv, pad, keys, a.head_dim, static_cast<T*>(a.dv) + token * a.dkv_token + at,
             a.dkv_token);
  const int64_t width = a.kv_heads * a.head_dim;
  if (a.dk)
    store_rows(dk, pad, keys, a.head_dim, static_cast<T*>(a.dk) + token * a.dkv_token + at,
               a.dkv_token);
  else
    store_rows(dk, pad, keys, a.head_dim, a.dk_direct + token * width + at, width);
}

// Of the queries from `w.first` to `end`.
template <class T>
void store_query_gradients(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t chunk,
                           int64_t end, const BwdScratch& w) {
  const int64_t at = head * a.head_dim, width = a.heads * a.head_dim;
  const int64_t token = s.q_token + w.first, n = end - w.first;
  if (a.dq_partial)
    store_rows(w.dq, w.pad, n, a.head_dim, a.dq_partial + (chunk * a.total_q + token) * width + at,
               width);
  else
    store_rows(w.dq, w.pad, n, a.head_dim, static_cast<T*>(a.dq) + token * a.dq_token + at,
               a.dq_token);
}

// One tile of keys against the packed queries, up to `last`, that see it.
template <class Words, class T>
void block_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, const Tile& tile,
                     int64_t last, const BwdScratch& w, const Sums& sums) {
  if (a.causal && last <= tile.first + s.unseen) return;
  const Packer<Words> pack(a.head_dim);
  const int64_t j = tile.first, keys = tile.count;
  pack.template keys<T>(a, s, kv_head, j, keys, keys, w.k_rows);
  stack_words<Words>(w.k_rows, pack.ld, keys, a.head_dim, w.k, w.pad);
  pack.template values<T>(a, s, kv_head, j, keys, w.v_rows);
  for (int64_t r = 0; r < keys; ++r)
    w.k_scale[r] = static_cast<float>(a.scale) * (a.k_rstd ? a.k_rstd[s.k_token + j + r] : 1.0f);
  for (const int32_t* run = tile.runs; run < tile.runs_end; run += 2) {
    const int64_t run_end = min_of<int64_t>(last, run[1]);
    for (int64_t i = max_of<int64_t>(w.first, run[0]); i < run_end;) {
      const int64_t next = (i / kBlock + 1) * kBlock, end = min_of(next, run_end);
      if (!a.causal || next > j + s.unseen)  // else no query here sees the first key
        tile_gradients<Words>(a, s, tile, i, end, w, sums);
      i = end;
    }
  }
}

inline int64_t key_tiles(const AttentionBwd& a, const Sequence& s) {
  return a.tiles ? a.num_tiles : attention_blocks(s.k_len);
}

inline Tile key_tile(const AttentionBwd& a, const Sequence& s, int64_t i, const int32_t* all) {
  if (a.tiles) return listed_tile(a, i);
  return {i * kBlock, min_of(kBlock, s.k_len - i * kBlock), all, all + 2};
}

// dq of all heads that share a kv head, from one chunk of its keys; dk and dv of the chunk.
template <class Words, class T>
void chunk_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, int64_t chunk) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tiles = key_tiles(a, s);
  const int64_t begin = tiles * chunk / a.key_chunks, end = tiles * (chunk + 1) / a.key_chunks;
  const int32_t all[2] = {0, static_cast<int32_t>(s.q_len)};
  const BwdScratch w(a, group);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    pack_queries<Words, T>(a, s, head, s.q_len, w);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = key_tile(a, s, i, all);
      float *dk = w.dk + tile.first * w.k_stride, *dv = w.dv + tile.first * w.k_stride;
      if (g == 0) {
        memset(dk, 0, static_cast<size_t>(tile.count * w.pad) * 4);
        memset(dv, 0, static_cast<size_t>(tile.count * w.pad) * 4);
      }
      block_gradients<Words, T>(a, s, kv_head, tile, s.q_len, w, {dk, dv, true});
      if (g == group - 1) store_key_gradients<T>(a, s, kv_head, tile.first, tile.count, dk, dv);
    }
    store_query_gradients<T>(a, s, head, chunk, s.q_len, w);
  }
}

// Queries that are packed at a time of a long sequence: few, so that there are many such spans.
constexpr int64_t kLongSpan = kAttentionSpan / 4;

// dk and dv of a group of tiles of a long sequence, from the queries of all heads that share it.
template <class Words, class T>
void group_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, int64_t group) {
  const int64_t per_kv = a.heads / a.kv_heads, begin = group * kAttentionGroup;
  const int64_t end = min_of(begin + kAttentionGroup, key_tiles(a, s));
  const int32_t all[2] = {0, static_cast<int32_t>(s.q_len)};
  BwdScratch w(a, per_kv);
  const int64_t tile_size = kBlock * w.pad;
  memset(w.dk, 0, static_cast<size_t>(kAttentionGroup * tile_size) * 4);
  memset(w.dv, 0, static_cast<size_t>(kAttentionGroup * tile_size) * 4);
  for (int64_t head = kv_head * per_kv; head < (kv_head + 1) * per_kv; ++head) {
    for (w.first = 0; w.first < s.q_len; w.first += kLongSpan) {
      const int64_t last = min_of(w.first + kLongSpan, s.q_len);
      if (a.causal && last <= begin * kBlock + s.unseen) continue;
      pack_queries<Words, T>(a, s, head, last, w);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = (i - begin) * tile_size;
        block_gradients<Words, T>(a, s, kv_head, key_tile(a, s, i, all), last, w,
                                  {w.dk + at, w.dv + at, false});
      }
    }
  }
  for (int64_t i = begin; i < end; ++i) {
    const Tile tile = key_tile(a, s, i, all);
    const int64_t at = (i - begin) * tile_size;
    store_key_gradients<T>(a, s, kv_head, tile.first, tile.count, w.dk + at, w.dv + at);
  }
}

// dq of a span of queries of a long sequence, from all keys.
template <class Words, class T>
void span_gradients(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t first) {
  const int64_t per_kv = a.heads / a.kv_heads, last = min_of(first + kLongSpan, s.q_len);
  const int32_t all[2] = {0, static_cast<int32_t>(s.q_len)};
  BwdScratch w(a, per_kv);
  w.first = first;
  pack_queries<Words, T>(a, s, head, last, w);
  for (int64_t i = 0; i < key_tiles(a, s); ++i) {
    const Tile tile = key_tile(a, s, i, all);
    block_gradients<Words, T>(a, s, head / per_kv, tile, last, w, {nullptr, nullptr, true});
  }
  store_query_gradients<T>(a, s, head, 0, last, w);
}

template <class Words, class T>
void bwd_long(const AttentionBwd& a) {
  const int64_t tiles = a.tiles ? a.num_tiles : attention_blocks(a.k_len);
  const int64_t groups = (tiles + kAttentionGroup - 1) / kAttentionGroup;
  parallel_for(a.batch * a.kv_heads * groups, a.threads, [&](int64_t task) {
    const Sequence s = sequence(a, task / (a.kv_heads * groups));
    if (task % groups * kAttentionGroup < key_tiles(a, s))
      group_gradients<Words, T>(a, s, task / groups % a.kv_heads, task % groups);
  });
  const int64_t spans = (a.q_len + kLongSpan - 1) / kLongSpan;
  parallel_for(a.batch * a.heads * spans, a.threads, [&](int64_t task) {
    const Sequence s = sequence(a, task / (a.heads * spans));
    if (task % spans * kLongSpan < s.q_len)
      span_gradients<Words, T>(a, s, task / spans % a.heads, task % spans * kLongSpan);
  });
}

template <class T>
void bwd(const AttentionBwd& a) {
  using Words = typename WordsOf<T>::type;
  if (attention_bwd_is_long(a.q_len, a.k_len, a.heads / a.kv_heads)) {
    bwd_long<Words, T>(a);
    return;
  }
  parallel_for(a.batch * a.kv_heads * a.key_chunks, a.threads, [&](int64_t task) {
    const Sequence s = sequence(a, task / (a.kv_heads * a.key_chunks));
    chunk_gradients<Words, T>(a, s, task / a.key_chunks % a.kv_heads, task % a.key_chunks);
  });
  if (!a.dq_partial || !a.dq) return;
  const int64_t width = a.heads * a.head_dim;
  for_row_chunks(a.total_q, a.threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* dq = static_cast<T*>(a.dq) + m * a.dq_token;
      for_each_vec(width, [&](int64_t i, int64_t n) {
        Vec total = load_at(a.dq_partial + m * width, i, n);
        for (int64_t c = 1; c < a.key_chunks; ++c)
          total = add(total, load_at(a.dq_partial + (c * a.total_q + m) * width, i, n));
        store_at(dq, total, i, n);
      });
    }
  });
}

}  // namespace

void attention_bwd(const AttentionBwd& a) {
  by_dtype(a.dtype, [&](auto x) { bwd<decltype(x)>(a); });
}

}  // namespace iv2::IV2_ISA
