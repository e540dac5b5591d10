// warp.cpp - what the lanes of a warp do together: each brings a value to a meeting and waits; the
// last to come finds everyone's result. Values travel unseen by the sanitizers, and only sync_warp
// orders memory: on a GPU a shuffle does not.
#include <cstring>

#include "block.h"

namespace shim {
namespace {

using Slots = unsigned char[kLanes][kSlot];
using Function = void (*)(const Slots& in, Slots& out, unsigned lanes);

void copy(void* to, const void* from, size_t size) {
  // not memcpy, which ThreadSanitizer watches
  for (size_t i = 0; i < size; ++i) {
    static_cast<volatile unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
  }
}

Meeting& meeting_of(Warp& warp, unsigned lanes, Site site) {
  Meeting* free = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.lanes == 0 && meeting.to_leave == 0) {
      free = free ? free : &meeting;
    } else if (meeting.lanes == lanes) {
      if (meeting.site.line != site.line) {
        fail("lanes of a warp meet in two places: lines " + std::to_string(meeting.site.line) +
             " and " + std::to_string(site.line) + " of " + site.file);
      }
      return meeting;
    } else if (meeting.lanes & lanes) {
      fail("lanes of a warp meet with two different masks, line " + std::to_string(site.line));
    }
  }
  if (free == nullptr) fail("too many meetings in one warp at once");
  free->lanes = lanes;
  free->arrived = 0;
  free->site = site;
  return *free;
}

// All `lanes` come here; `out` is what f made of what they brought.
void meet(unsigned lanes, const void* in, size_t in_size, void* out, size_t out_size, Site site,
          Function f, bool orders_memory) {
  const int index = block.running->place.index, w = index / kLanes, lane = index % kLanes;
  Warp& warp = block.warps[w];
  const int present = block.size - w * kLanes;
  if (present < kLanes) lanes &= (1u << present) - 1;
  if (!(lanes >> lane & 1)) fail("a lane is not in its own mask");
  Meeting& meeting = meeting_of(warp, lanes, site);
  uint64_t* cell = &block.cells->meeting[w][&meeting - warp.meetings];
  if (orders_memory) release(cell);
  copy(meeting.in[lane], in, in_size);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == lanes) {
    if (f) f(meeting.in, meeting.out, lanes);
    meeting.to_leave = lanes;
    meeting.lanes = 0;
    std::vector<int> all;
    for (int l = 0; l < kLanes; ++l) {
      if (lanes >> l & 1) all.push_back(w * kLanes + l);
    }
    wake(all);
  }
  wait();
  copy(out, meeting.out[lane], out_size);
  meeting.to_leave &= ~(1u << lane);
  if (orders_memory) acquire(cell);
}

struct Sent {
  unsigned char value[16];
  int32_t source;
};
void deliver(const Slots& in, Slots& out, unsigned lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    int source = reinterpret_cast<const Sent*>(in[lane])->source;
    if (source < 0 || source >= kLanes || !(lanes >> source & 1)) source = lane;
    copy(out[lane], in[source], sizeof(Sent::value));
  }
}

void count_votes(const Slots& in, Slots& out, unsigned lanes) {
  unsigned votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) && in[lane][0]) votes |= 1u << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) copy(out[lane], &votes, sizeof(votes));
}

float half_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1Fu,
                 mantissa = half & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  float x;
  copy(&x, &bits, 4);
  return x;
}
template <bool is_bf16>
float element(uint32_t pair, int upper) {
  const uint32_t bits = upper ? pair >> 16 : pair & 0xFFFFu;
  if (!is_bf16) return half_to_float(bits);
  const uint32_t wide = bits << 16;
  float x;
  copy(&x, &wide, 4);
  return x;
}

struct Fragments {
  float d[4];
  uint32_t a[4], b[2];
};
// PTX's layout of m16n8k16: lane 4 g + t has rows g and g + 8 of a and d, column g of b.
template <bool is_bf16>
void multiply(const Slots& in, Slots& out, unsigned lanes) {
  if (lanes != ~0u) fail("mma needs all lanes of a warp");
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragments& f = *reinterpret_cast<const Fragments*>(in[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int upper = 0; upper < 2; ++upper) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][t * 2 + upper + i / 2 * 8] = element<is_bf16>(f.a[i], upper);
      }
      for (int i = 0; i < 2; ++i) b[g][t * 2 + upper + i * 8] = element<is_bf16>(f.b[i], upper);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const Fragments& f = *reinterpret_cast<const Fragments*>(in[lane]);
    float d[4];
    for (int i = 0; i < 4; ++i) {
      const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      d[i] = f.d[i] + sum;
    }
    copy(out[lane], d, sizeof(d));
  }
  ++counters.matrix_products;
}

struct Row {
  uint16_t elements[8];
  uint64_t address;
};
template <bool transposed>
void distribute(const Slots& in, Slots& out, unsigned lanes) {
  if (lanes != ~0u) fail("ldmatrix needs all lanes of a warp");
  const auto row = [&](int i) -> const Row& { return *reinterpret_cast<const Row*>(in[i]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    // the eight rows come at once, four banks each
    int rows_in[8] = {}, most = 1;
    for (int i = 0; i < 8; ++i) {
      bool is_new = true;
      for (int j = 0; j < i; ++j) {
        if (row(matrix * 8 + j).address == row(matrix * 8 + i).address) is_new = false;
      }
      int& count = rows_in[row(matrix * 8 + i).address / 16 % 8];
      count += is_new ? 1 : 0;
      most = count > most ? count : most;
    }
    counters.bank_conflicts += static_cast<uint64_t>(most - 1);
    for (int lane = 0; lane < kLanes; ++lane) {
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int r = transposed ? lane % 4 * 2 + k : lane / 4;
        const int c = transposed ? lane / 4 : lane % 4 * 2 + k;
        pair[k] = row(matrix * 8 + r).elements[c];
      }
      copy(out[lane] + matrix * 4, pair, 4);
    }
  }
}

}  // namespace

void sync_warp(unsigned lanes, Site site) {
  meet(lanes, nullptr, 0, nullptr, 0, site, nullptr, true);
}

void shuffle(unsigned lanes, void* value, size_t size, int source, Site site) {
  Sent sent;
  copy(sent.value, value, size);
  sent.source = source;
  meet(lanes, &sent, sizeof(sent), value, size, site, deliver, false);
}

unsigned ballot(unsigned lanes, bool yes, Site site) {
  const unsigned char vote = yes ? 1 : 0;
  unsigned votes = 0;
  meet(lanes, &vote, 1, &votes, sizeof(votes), site, count_votes, false);
  return votes;
}

void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16, Site site) {
  Fragments fragments;
  copy(fragments.d, d, sizeof(d));
  copy(fragments.a, a, sizeof(a));
  copy(fragments.b, b, sizeof(b));
  meet(~0u, &fragments, sizeof(fragments), d, sizeof(d), site,
       is_bf16 ? multiply<true> : multiply<false>, false);
}

void ldmatrix(uint32_t (&tiles)[4], const uint16_t (&elements)[8], const void* address,
              bool transposed, Site site) {
  Row row;
  copy(row.elements, elements, sizeof(elements));
  row.address = reinterpret_cast<uint64_t>(address);
  if (row.address % 16 != 0) fail("ldmatrix: a row's address must be a multiple of 16");
  meet(~0u, &row, sizeof(row), tiles, sizeof(tiles), site,
       transposed ? distribute<true> : distribute<false>, false);
}

}  // namespace shim
