// attention.cpp - o = softmax(q k^T scale) v and its gradients, without the score matrix.
//
// Forward: a task is one kv head of one sequence and some of its query blocks. It packs the keys
// (transposed) and values that they see into its scratch, where they stay in cache, and for 48
// queries at a time runs over blocks of keys: scores, online softmax with a lazily raised maximum,
// P v.
// P overwrites the scores as an operand A. Of long sequences it packs a span of keys at a time and
// takes a group of tiles over it, so that memory is constant. Backward: attention_bwd.cpp.
// Bound by the multipliers; exp2 and packing take a tenth to
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

// What a tile of queries keeps between spans of keys.
struct TileState {
  float *q, *out;      // [64, pad]
  float *peak, *sums;  // of a query: the maximum in use; [64, Vec::size]
  float* started;      // 1 once `out` holds something
};

struct FwdScratch {
  int64_t pad, first, blocks;      // the span begins at key `first`
  float *keys, *values, *k_scale;  // of a span, in blocks: [pad, kKeys], [kKeys, pad], [kKeys]
  float* packed;                   // 1 at the first key of a block that is packed, else 0
  float *rows, *scores;            // tiles
  float* states;
  explicit FwdScratch(const AttentionFwd& a) : pad(attention_pad(a.head_dim)), first(-1) {
    blocks = attention_blocks(attention_span(a.k_len)) + 1;  // whole blocks of 128
    float* p = a.scratch + thread_index() * attention_fwd_scratch(a.head_dim, a.k_len);
    keys = take(p, blocks * kBlock * pad), values = take(p, blocks * kBlock * pad);
    k_scale = take(p, blocks * kBlock), packed = take(p, blocks * kBlock);
    rows = take(p, 2 * kBlock * pad), scores = take(p, 2 * kBlock * kBlock);
    states = p;
  }
  // The keys from `key` on take the place of those that were packed.
  void move_to(int64_t key) {
    if (key == first) return;
    first = key;
    for (int64_t j = 0; j < blocks * kBlock; j += kBlock) packed[j] = 0.0f;
  }
  TileState state(int64_t i) const {
    float* p = states + i * kBlock * (2 * pad + 18);
    TileState t;
    t.q = take(p, kBlock * pad), t.out = take(p, kBlock * pad);
    t.peak = take(p, kBlock), t.sums = take(p, kBlock * 16), t.started = p;
    return t;
  }
};

template <class Words, class T>
void pack_keys_and_values(const AttentionFwd& a, const Sequence& s, int64_t kv_head, int64_t first,
                          const FwdScratch& w) {
  const Packer<Words> pack(a.head_dim);
  const int64_t at = first - w.first;
  const int64_t n = min_of(kKeys<Words>, s.k_len - first), n_padded = round_up(n, 16);
  pack.template keys<T>(a, s, kv_head, first, n, n_padded, w.rows);
  transpose_words(w.rows, pack.ld, n_padded, words<Words>(pack.dim), w.keys + at * w.pad,
                  kKeys<Words>);
  pack.template values<T>(a, s, kv_head, first, n, w.rows);
  stack_words<Words>(w.rows, pack.ld, n, pack.dim, w.values + at * w.pad, w.pad);
  for (int64_t j = first; j < first + kKeys<Words>; ++j) {
    const float rstd = j >= s.k_len ? 0.0f : a.k_rstd ? a.k_rstd[s.k_token + j] : 1.0f;
    w.k_scale[j - w.first] = rstd * static_cast<float>(a.scale) * kPerNat<Words>;
  }
  w.packed[at] = 1.0f;
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
void softmax_block(const FwdScratch& w, const TileState& t, int64_t rows, const float* k_scale,
                   const Visible& seen, int64_t dim) {
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
    float* sums = t.sums + r * 16;
    if (any_above(highest, t.peak[r] + kSlack))
      rescale<Words>(max_across(highest), t.peak + r, sums, t.out + r * w.pad, dim);
    const Vec base = set(t.peak[r] == -kInfinity ? 0.0f : t.peak[r]);
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
inline void softmax_vecs(int64_t vecs, const FwdScratch& w, const TileState& t, int64_t rows,
                         const float* k_scale, const Visible& seen, int64_t dim) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) {
      softmax_vecs<Words, kVecs - 1>(vecs, w, t, rows, k_scale, seen, dim);
      return;
    }
  }
  softmax_block<Words, kVecs>(w, t, rows, k_scale, seen, dim);
}

template <class Words, class T>
void store_output(const AttentionFwd& a, const Sequence& s, int64_t head, int64_t first,
                  int64_t rows, const TileState& t) {
  const int64_t pad = attention_pad(a.head_dim);
  if (*t.started == 0.0f) memset(t.out, 0, static_cast<size_t>(rows * pad) * 4);
  float* lse =
      a.lse +
      (a.cu_seqlens_q ? head * a.total_q + s.q_token : (s.batch * a.heads + head) * a.q_len) +
      first;
  for (int64_t r = 0; r < rows; ++r) {
    T* o = static_cast<T*>(a.o) + ((s.q_token + first + r) * a.heads + head) * a.head_dim;
    const float total = sum(load(t.sums + r * 16));
    const Vec inverse = set(total == 0.0f ? 0.0f : 1.0f / total);
    for_each_vec(a.head_dim, [&](int64_t i, int64_t n) {
      store_at(o, mul(load(t.out + r * pad + i), inverse), i, n);
    });
    lse[r] = total == 0.0f ? -kInfinity : t.peak[r] / kPerNat<Words> + __builtin_logf(total);
  }
}

// The packed queries of a tile and keys `from` to `end` of one packed block.
template <class Words>
void attend_keys(const AttentionFwd& a, const Sequence& s, const Tile& tile, int64_t from,
                 int64_t end, const FwdScratch& w, const TileState& t) {
  const int64_t ld = round_up(words<Words>(a.head_dim), 16),
                block = from / kKeys<Words> * kKeys<Words>, at = block - w.first;
  const int64_t skip = (from - block) / Vec::size * Vec::size, j = block + skip, keys = end - j;
  const int64_t vecs = (keys + Vec::size - 1) / Vec::size;
  const int64_t dim_vecs = (a.head_dim + Vec::size - 1) / Vec::size;
  multiply<Words>({t.q, ld, w.keys + at * w.pad + skip, kKeys<Words>, w.scores, kKeys<Words>,
                   words<Words>(a.head_dim)},
                  tile.count, vecs, false);
  // In the block of the diagonal visible keys grow by one a row; `end` ends them.
  const int64_t below = tile.first + 1 - s.unseen - j;
  const bool diagonal = a.causal && below < keys;
  softmax_vecs<Words>(vecs, w, t, tile.count, w.k_scale + at + skip,
                      {from - j, diagonal ? below : keys, diagonal ? 1 : 0}, a.head_dim);
  multiply<Words>({w.scores, kKeys<Words>, w.values + at * w.pad + skip / Words::per_word * w.pad,
                   w.pad, t.out, w.pad, words<Words>(keys)},
                  tile.count, dim_vecs, *t.started != 0.0f);
  *t.started = 1.0f;
}

template <class Words, class T>
void start_tile(const AttentionFwd& a, const Sequence& s, int64_t head, const Tile& tile,
                const TileState& t) {
  const Packer<Words> pack(a.head_dim);
  pack.template queries<T>(a, s, head, tile.first, tile.count, tile.count, t.q);
  for (int64_t r = 0; r < tile.count; ++r) {
    t.peak[r] = -kInfinity;
    store(t.sums + r * 16, set(0));
  }
  *t.started = 0.0f;
}

// One tile of queries over the keys of a span that they see.
template <class Words, class T>
void attend(const AttentionFwd& a, const Sequence& s, int64_t kv_head, const Tile& tile,
            const FwdScratch& w, const TileState& t) {
  for (const int32_t* run = tile.runs; run < tile.runs_end; run += 2) {
    const int64_t last = min_of<int64_t>(w.first + kAttentionSpan, run[1]);
    for (int64_t j = max_of<int64_t>(w.first, run[0]); j < last;) {
      const int64_t block = j / kKeys<Words> * kKeys<Words>;
      const int64_t end = min_of<int64_t>(block + kKeys<Words>, last);
      if (w.packed[block - w.first] == 0.0f)
        pack_keys_and_values<Words, T>(a, s, kv_head, block, w);
      attend_keys<Words>(a, s, tile, j, end, w, t);
      j = end;
    }
  }
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

// Tiles `begin` to `end` of all heads that share a kv head.
template <class Words, class T>
void attend_tiles(const AttentionFwd& a, const Sequence& s, int64_t kv_head, int64_t begin,
                  int64_t end, FwdScratch& w) {
  const int64_t first_head = kv_head * (a.heads / a.kv_heads);
  const int64_t of_head = a.tiles ? a.num_tiles : query_blocks(s.q_len);
  const int64_t size = s.k_len > kAttentionSpan ? kAttentionGroup : 1;
  for (int64_t group = begin; group < end; group += size) {
    const int64_t group_end = min_of(group + size, end);
    const auto each = [&](auto use) {
      for (int64_t i = group; i < group_end; ++i) {
        int32_t run[2];
        use(first_head + i / of_head,
            a.tiles ? listed_tile(a, i % of_head) : dense_tile(a, s, i % of_head, run),
            w.state(i - group));
      }
    };
    each([&](int64_t head, const Tile& tile, const TileState& t) {
      start_tile<Words, T>(a, s, head, tile, t);
    });
    for (int64_t key = 0; key < s.k_len; key += kAttentionSpan) {
      w.move_to(key);
      each([&](int64_t, const Tile& tile, const TileState& t) {
        attend<Words, T>(a, s, kv_head, tile, w, t);
      });
    }
    each([&](int64_t head, const Tile& tile, const TileState& t) {
      store_output<Words, T>(a, s, head, tile.first, tile.count, t);
    });
  }
}

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
    const int64_t all = group * (a.tiles ? a.num_tiles : query_blocks(s.q_len));
    const int64_t begin = all * piece / pieces, end = all * (piece + 1) / pieces;
    if (begin == end) return;
    FwdScratch w(a);
    attend_tiles<Words, T>(a, s, kv_head, begin, end, w);
  });
}

}  // namespace

void attention_fwd(const AttentionFwd& a) {
  by_dtype(a.dtype, [&](auto x) { fwd<decltype(x)>(a); });
}

}  // namespace iv2::IV2_ISA
