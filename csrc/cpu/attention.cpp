// attention.cpp - o = softmax(q k^T scale) v and its gradients, without the score matrix.
//
// Forward: a task is one kv head of one sequence and some of its query blocks. It packs the keys
// (transposed) and values that they see into its scratch, where they stay in cache, and for 48
// queries at a time runs over blocks of keys: scores, online softmax with a lazily raised maximum,
// P v.
// P overwrites the scores as an operand A. Backward: a task is one kv head of one sequence and a
// fixed chunk of its keys; for each block of keys it runs over the queries with S^T = k q^T
// recomputed from lse, so that P^T and dS^T come out as operands for dv and dk, and dS (the same
// words, read along columns) for dq. All sums are fp32 and stay in scratch; with several chunks dq
// is summed from their parts, in order. Bound by the multipliers; exp2 and packing take a tenth to
// a fifth. With lists, a tile runs over the part of each packed block that a run covers: whole
// vectors are computed and their ends masked, so runs need no alignment.
#include "attention.h"

#include "../kernels.h"

namespace iv2::IV2_ISA {
namespace {

// Forward has blocks of its own: 48 queries are whole register tiles, and more keys at a time touch
// the sums of P v less often. Scores of 48 x 128 or 64 in fp32 fit in L1.
constexpr int64_t kQueries = kAttentionQueries;
template <class Words>
constexpr int64_t kKeys = kBlock * Words::per_word;
// Scores may exceed the maximum in use by this much (2^8 or e^8 in P) before sums are rescaled.
constexpr float kSlack = 8.0f;

struct FwdScratch {
  int64_t pad;
  float *keys, *values, *k_scale;  // of a sequence, in blocks: [pad, kKeys], [kKeys, pad], [kKeys]
  float* packed;                   // 1 at the first key of a block that is packed, else 0
  float *rows, *q, *scores, *out;  // tiles
  float *peak, *sums;              // of a query: the maximum in use; [64, Vec::size]
  explicit FwdScratch(const AttentionFwd& a) : pad(attention_pad(a.head_dim)) {
    const int64_t blocks = attention_blocks(a.k_len) + 1;  // whole blocks of 128
    float* p = a.scratch + thread_index() * attention_fwd_scratch(a.head_dim, a.k_len);
    keys = take(p, blocks * kBlock * pad), values = take(p, blocks * kBlock * pad);
    k_scale = take(p, blocks * kBlock), packed = take(p, blocks * kBlock);
    for (int64_t j = 0; j < blocks * kBlock; j += kBlock) packed[j] = 0.0f;
    rows = take(p, 2 * kBlock * pad), q = take(p, kBlock * pad), out = take(p, kBlock * pad);
    scores = take(p, 2 * kBlock * kBlock);
    peak = take(p, kBlock), sums = take(p, kBlock * 16);
  }
};

template <class Words, class T>
void pack_keys_and_values(const AttentionFwd& a, const Sequence& s, int64_t kv_head, int64_t first,
                          const FwdScratch& w) {
  const Packer<Words> pack(a.head_dim);
  const int64_t n = min_of(kKeys<Words>, s.k_len - first), n_padded = round_up(n, 16);
  pack.template keys<T>(a, s, kv_head, first, n, n_padded, w.rows);
  transpose_words(w.rows, pack.ld, n_padded, words<Words>(pack.dim), w.keys + first * w.pad,
                  kKeys<Words>);
  pack.template values<T>(a, s, kv_head, first, n, w.rows);
  stack_words<Words>(w.rows, pack.ld, n, pack.dim, w.values + first * w.pad, w.pad);
  for (int64_t j = first; j < first + kKeys<Words>; ++j) {
    const float rstd = j >= s.k_len ? 0.0f : a.k_rstd ? a.k_rstd[s.k_token + j] : 1.0f;
    w.k_scale[j] = rstd * static_cast<float>(a.scale) * kPerNat<Words>;
  }
  w.packed[first] = 1.0f;
}

// Raises the maximum of one query to `top`: what was summed shrinks.
template <class Words>
inline void rescale(float top, float* peak, float* sums, float* out, int64_t dim) {
  if (*peak > -kInfinity) {
    const Vec shrink = exp_of_score<Words>(set(*peak - top));
    store(sums, mul(load(sums), shrink));
    for (int64_t i = 0; i < dim; i += Vec::size) store(out + i, mul(load(out + i), shrink));
  }
  *peak = top;
}

// Of the keys of a block, query r sees `first` to `end` + r * step.
struct Visible {
  int64_t first, end, step;
};

// One block of scores to probabilities, in place.
template <class Words, int kVecs>
void softmax_block(const FwdScratch& w, int64_t rows, const float* k_scale, const Visible& seen,
                   int64_t dim) {
  int64_t visible = seen.end;
  for (int64_t r = 0; r < rows; ++r, visible += seen.step) {
    float* s = w.scores + r * kKeys<Words>;
    Vec y[kVecs];
    for (int v = 0; v < kVecs; ++v)
      y[v] = mul(load(s + v * Vec::size), load(k_scale + v * Vec::size));
    if (visible < kVecs * Vec::size) {
      const float* mask = keep_below(max_of<int64_t>(visible, 0));
      for (int v = 0; v < kVecs; ++v) y[v] = min(load(mask + v * Vec::size), y[v]);
    }
    // What is hidden at the start is less than a vector.
    if (seen.first > 0) y[0] = min(load(keep_from(seen.first)), y[0]);
    Vec highest = y[0];
    for (int v = 1; v < kVecs; ++v) highest = max(highest, y[v]);
    float* sums = w.sums + r * 16;
    if (any_above(highest, w.peak[r] + kSlack))
      rescale<Words>(max_across(highest), w.peak + r, sums, w.out + r * w.pad, dim);
    const Vec base = set(w.peak[r] == -kInfinity ? 0.0f : w.peak[r]);
    Vec total = load(sums);
    for (int v = 0; v < kVecs; ++v) {
      y[v] = exp_of_score<Words>(sub(y[v], base));
      total = add(total, y[v]);
    }
    store(sums, total);
    store_words<Words, kVecs>(s, y);
  }
}

template <class Words, int kVecs = kKeys<Words> / Vec::size>
inline void softmax_vecs(int64_t vecs, const FwdScratch& w, int64_t rows, const float* k_scale,
                         const Visible& seen, int64_t dim) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) {
      softmax_vecs<Words, kVecs - 1>(vecs, w, rows, k_scale, seen, dim);
      return;
    }
  }
  softmax_block<Words, kVecs>(w, rows, k_scale, seen, dim);
}

template <class Words, class T>
void store_output(const AttentionFwd& a, const Sequence& s, int64_t head, int64_t first,
                  int64_t rows, const FwdScratch& w) {
  float* lse =
      a.lse +
      (a.cu_seqlens_q ? head * a.total_q + s.q_token : (s.batch * a.heads + head) * a.q_len) +
      first;
  for (int64_t r = 0; r < rows; ++r) {
    T* o = static_cast<T*>(a.o) + ((s.q_token + first + r) * a.heads + head) * a.head_dim;
    const float total = sum(load(w.sums + r * 16));
    const Vec inverse = set(total == 0.0f ? 0.0f : 1.0f / total);
    for_each_vec(a.head_dim, [&](int64_t i, int64_t n) {
      store_at(o, mul(load(w.out + r * w.pad + i), inverse), i, n);
    });
    lse[r] = total == 0.0f ? -kInfinity : w.peak[r] / kPerNat<Words> + __builtin_logf(total);
  }
}

// The packed queries of a tile and keys `from` to `end` of one packed block.
template <class Words>
void attend_keys(const AttentionFwd& a, const Sequence& s, const Tile& tile, int64_t from,
                 int64_t end, bool started, const FwdScratch& w) {
  const int64_t ld = round_up(words<Words>(a.head_dim), 16),
                block = from / kKeys<Words> * kKeys<Words>;
  const int64_t skip = (from - block) / Vec::size * Vec::size, j = block + skip, keys = end - j;
  const int64_t vecs = (keys + Vec::size - 1) / Vec::size;
  const int64_t dim_vecs = (a.head_dim + Vec::size - 1) / Vec::size;
  multiply<Words>({w.q, ld, w.keys + block * w.pad + skip, kKeys<Words>, w.scores, kKeys<Words>,
                   words<Words>(a.head_dim)},
                  tile.count, vecs, false);
  // In the block of the diagonal visible keys grow by one a row; `end` ends them.
  const int64_t below = tile.first + 1 - s.unseen - j;
  const bool diagonal = a.causal && below < keys;
  softmax_vecs<Words>(vecs, w, tile.count, w.k_scale + j,
                      {from - j, diagonal ? below : keys, diagonal ? 1 : 0}, a.head_dim);
  multiply<Words>(
      {w.scores, kKeys<Words>, w.values + block * w.pad + skip / Words::per_word * w.pad, w.pad,
       w.out, w.pad, words<Words>(keys)},
      tile.count, dim_vecs, started);
}

// One tile of queries over all keys that they see.
template <class Words, class T>
void attend(const AttentionFwd& a, const Sequence& s, int64_t head, const Tile& tile,
            const FwdScratch& w) {
  const Packer<Words> pack(a.head_dim);
  const int64_t rows = tile.count, kv_head = head / (a.heads / a.kv_heads);
  pack.template queries<T>(a, s, head, tile.first, rows, rows, w.q);
  for (int64_t r = 0; r < rows; ++r) {
    w.peak[r] = -kInfinity;
    store(w.sums + r * 16, set(0));
  }
  bool started = false;
  for (const int32_t* run = tile.runs; run < tile.runs_end; run += 2) {
    for (int64_t j = run[0]; j < run[1];) {
      const int64_t block = j / kKeys<Words> * kKeys<Words>;
      const int64_t end = min_of<int64_t>(block + kKeys<Words>, run[1]);
      if (w.packed[block] == 0.0f) pack_keys_and_values<Words, T>(a, s, kv_head, block, w);
      attend_keys<Words>(a, s, tile, j, end, started, w);
      started = true;
      j = end;
    }
  }
  if (!started) memset(w.out, 0, static_cast<size_t>(rows * w.pad) * 4);
  store_output<Words, T>(a, s, head, tile.first, rows, w);
}

// Without lists: the queries of block i, and all keys up to the last one's own.
inline Tile dense_tile(const AttentionFwd& a, const Sequence& s, int64_t i, int32_t* run) {
  const int64_t first = i * kQueries, rows = min_of(kQueries, s.q_len - first);
  int64_t k_len = s.k_len;
  if (a.causal) k_len = max_of<int64_t>(0, min_of(k_len, first + rows - s.unseen));
  run[0] = 0, run[1] = static_cast<int32_t>(k_len);
  return {first, rows, run, run + 2};
}

inline int64_t query_blocks(int64_t tokens) { return (tokens + kQueries - 1) / kQueries; }

template <class T>
void fwd(const AttentionFwd& a) {
  using Words = typename WordsOf<T>::type;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t q_blocks = a.tiles ? a.num_tiles : query_blocks(a.q_len);
  // About six tasks a thread, of at least eight blocks, which repay packing the keys again.
  const int64_t blocks = group * q_blocks, tasks = a.batch * a.kv_heads;
  const int64_t wanted = max_of<int64_t>(8, blocks * tasks / (6 * a.threads));
  const int64_t pieces = (blocks + wanted - 1) / wanted;
  parallel_for(tasks * pieces, a.threads, [&](int64_t task) {
    const Sequence s = sequence(a, task / (a.kv_heads * pieces));
    const int64_t kv_head = task / pieces % a.kv_heads, piece = task % pieces;
    const int64_t of_head = a.tiles ? a.num_tiles : query_blocks(s.q_len), all = group * of_head;
    const int64_t begin = all * piece / pieces, end = all * (piece + 1) / pieces;
    if (begin == end) return;
    const FwdScratch w(a);
    for (int64_t i = begin; i < end; ++i) {
      int32_t run[2];
      const Tile tile = a.tiles ? listed_tile(a, i % of_head) : dense_tile(a, s, i % of_head, run);
      attend<Words, T>(a, s, kv_head * group + i / of_head, tile, w);
    }
  });
}

struct BwdScratch {
  int64_t pad, k_stride;
  float *q_t, *q, *do_t, *d_o, *dq, *lse, *delta;  // of a sequence, in blocks of 64 queries
  float *dk, *dv;                                  // of one block of keys, or of a sequence
  float *rows, *k_rows, *k, *v_rows;               // tiles of 64 rows
  float *p, *ds, *ds_pairs, *k_scale;
  BwdScratch(const AttentionBwd& a, int64_t group) : pad(attention_pad(a.head_dim)) {
    const int64_t q_size = attention_blocks(a.q_len) * kBlock;
    const int64_t k_size = group > 1 ? attention_blocks(a.k_len) * kBlock : kBlock;
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

// Queries and output gradients of one head, their lse (negated) and delta =
// sum(do o) - dlse; dq is cleared. Padded queries have probability zero.
template <class Words, class T>
void pack_queries(const AttentionBwd& a, const Sequence& s, int64_t head, const BwdScratch& w) {
  const Packer<Words> pack(a.head_dim);
  const int64_t lse_row =
      a.cu_seqlens_q ? head * a.total_q + s.q_token : (s.batch * a.heads + head) * a.q_len;
  for (int64_t first = 0; first < s.q_len; first += kBlock) {
    const int64_t n = min_of(kBlock, s.q_len - first), n_padded = round_up(n, 32);
    const int64_t depth = words<Words>(a.head_dim), at = first * w.pad;
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
      w.lse[first + r] = lse == -kInfinity ? -kInfinity : -lse * kPerNat<Words>;
      w.delta[first + r] = sum(dot) - (r < n && a.dlse ? a.dlse[row] : 0.0f);
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

// The packed keys of a tile and queries `from` to `end` of one block: adds to dk, dv and dq.
template <class Words>
void tile_gradients(const AttentionBwd& a, const Sequence& s, const Tile& tile, int64_t from,
                    int64_t end, const BwdScratch& w, float* dk, float* dv) {
  constexpr int64_t kStep = Vec::size * Words::per_word;
  const int64_t keys = tile.count, ld = round_up(words<Words>(a.head_dim), 16);
  const int64_t dim_vecs = (a.head_dim + Vec::size - 1) / Vec::size, pad = w.pad;
  const int64_t block = from / kBlock * kBlock, skip = (from - block) / kStep * kStep;
  const int64_t i = block + skip, queries = end - i;
  const int64_t vecs = round_up(queries, kStep) / Vec::size;
  const int64_t depth = words<Words>(a.head_dim), columns = block * pad + skip;
  const int64_t hidden = a.causal ? tile.first + s.unseen - i : from - i;
  multiply<Words>({w.k_rows, ld, w.q_t + columns, kBlock, w.p, kBlock, depth}, keys, vecs, false);
  multiply<Words>({w.v_rows, ld, w.do_t + columns, kBlock, w.ds, kBlock, depth}, keys, vecs, false);
  score_gradients_vecs<Words>(vecs, {w.p, w.ds, w.ds_pairs, w.k_scale, w.lse + i, w.delta + i, keys,
                                     hidden, a.causal ? 1 : 0, queries});
  const int64_t q_words = words<Words>(queries), at = (block + skip / Words::per_word) * pad;
  multiply<Words>({w.p, kBlock, w.d_o + at, pad, dv, pad, q_words}, keys, dim_vecs, true);
  multiply<Words>({w.ds, kBlock, w.q + at, pad, dk, pad, q_words}, keys, dim_vecs, true);
  const float* ds = Words::per_word == 1 ? w.ds : w.ds_pairs;
  multiply<Words, true>({ds, kBlock, w.k, pad, w.dq + i * pad, pad, words<Words>(keys)}, queries,
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

template <class T>
void store_query_gradients(const AttentionBwd& a, const Sequence& s, int64_t head, int64_t chunk,
                           const float* dq) {
  const int64_t pad = attention_pad(a.head_dim), at = head * a.head_dim;
  const int64_t width = a.heads * a.head_dim;
  if (a.dq_partial)
    store_rows(dq, pad, s.q_len, a.head_dim,
               a.dq_partial + (chunk * a.total_q + s.q_token) * width + at, width);
  else
    store_rows(dq, pad, s.q_len, a.head_dim, static_cast<T*>(a.dq) + s.q_token * a.dq_token + at,
               a.dq_token);
}

// One tile of keys against the queries of one head that see it.
template <class Words, class T>
void block_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, const Tile& tile,
                     const BwdScratch& w, float* dk, float* dv) {
  const Packer<Words> pack(a.head_dim);
  const int64_t j = tile.first, keys = tile.count;
  pack.template keys<T>(a, s, kv_head, j, keys, keys, w.k_rows);
  stack_words<Words>(w.k_rows, pack.ld, keys, a.head_dim, w.k, w.pad);
  pack.template values<T>(a, s, kv_head, j, keys, w.v_rows);
  for (int64_t r = 0; r < keys; ++r)
    w.k_scale[r] = static_cast<float>(a.scale) * (a.k_rstd ? a.k_rstd[s.k_token + j + r] : 1.0f);
  for (const int32_t* run = tile.runs; run < tile.runs_end; run += 2) {
    for (int64_t i = run[0]; i < run[1];) {
      const int64_t next = (i / kBlock + 1) * kBlock, end = min_of<int64_t>(next, run[1]);
      if (!a.causal || next > j + s.unseen)  // else no query here sees the first key
        tile_gradients<Words>(a, s, tile, i, end, w, dk, dv);
      i = end;
    }
  }
}

inline Tile key_tile(const AttentionBwd& a, const Sequence& s, int64_t i, const int32_t* all) {
  if (a.tiles) return listed_tile(a, i);
  return {i * kBlock, min_of(kBlock, s.k_len - i * kBlock), all, all + 2};
}

// dq of all heads that share a kv head, from one chunk of its keys; dk and dv of the chunk.
template <class Words, class T>
void chunk_gradients(const AttentionBwd& a, const Sequence& s, int64_t kv_head, int64_t chunk) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tiles = a.tiles ? a.num_tiles : attention_blocks(s.k_len);
  const int64_t begin = tiles * chunk / a.key_chunks, end = tiles * (chunk + 1) / a.key_chunks;
  const int32_t all[2] = {0, static_cast<int32_t>(s.q_len)};
  const BwdScratch w(a, group);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    pack_queries<Words, T>(a, s, head, w);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile = key_tile(a, s, i, all);
      float *dk = w.dk + tile.first * w.k_stride, *dv = w.dv + tile.first * w.k_stride;
      if (g == 0) {
        memset(dk, 0, static_cast<size_t>(tile.count * w.pad) * 4);
        memset(dv, 0, static_cast<size_t>(tile.count * w.pad) * 4);
      }
      block_gradients<Words, T>(a, s, kv_head, tile, w, dk, dv);
      if (g == group - 1) store_key_gradients<T>(a, s, kv_head, tile.first, tile.count, dk, dv);
    }
    store_query_gradients<T>(a, s, head, chunk, w.dq);
  }
}

template <class T>
void bwd(const AttentionBwd& a) {
  using Words = typename WordsOf<T>::type;
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

void attention_fwd(const AttentionFwd& a) {
  by_dtype(a.dtype, [&](auto x) { fwd<decltype(x)>(a); });
}

void attention_bwd(const AttentionBwd& a) {
  by_dtype(a.dtype, [&](auto x) { bwd<decltype(x)>(a); });
}

}  // namespace iv2::IV2_ISA
