// traffic.cpp - what a kernel's accesses cost. The i-th access of each lane of a warp from one
// place in the code is one instruction: global memory moves the 32-byte sectors it touches, shared
// memory serves each of its 32 banks once a turn.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "block.h"

namespace shim {
namespace {

constexpr uint64_t kSector = 32, kBanks = 32;

std::unordered_set<uint64_t> cached;  // sectors that read_cached of this launch has read

struct LaneAccess {
  const void* site;
  uint32_t turn;  // how often the lane had been there
  AccessRecord record;
};

void count_global(const LaneAccess* first, const LaneAccess* last) {
  std::vector<uint64_t> sectors;
  for (const LaneAccess* access = first; access != last; ++access) {
    const AccessRecord& r = access->record;
    for (uint64_t s = r.address / kSector; s <= (r.address + r.size - 1) / kSector; ++s) {
      sectors.push_back(s);
    }
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  if (first->record.kind == Access::kRead) counters.read += sectors.size() * kSector;
  if (first->record.kind == Access::kWrite) counters.written += sectors.size() * kSector;
  if (first->record.kind == Access::kReadCached) {
    for (uint64_t sector : sectors) {
      counters.read_cached += cached.insert(sector).second ? kSector : 0;
    }
  }
}

// So many lanes as 128 bytes serve come at once; words that two share are served together.
void count_shared(const LaneAccess* first, const LaneAccess* last) {
  const long lanes = static_cast<long>(4 * kBanks / std::max<uint32_t>(first->record.size, 4));
  for (; first < last; first += std::min<long>(lanes, last - first)) {
    std::unordered_set<uint64_t> words;
    for (long i = 0; i < std::min<long>(lanes, last - first); ++i) {
      const AccessRecord& r = first[i].record;
      for (uint64_t word = r.address / 4; word <= (r.address + r.size - 1) / 4; ++word) {
        words.insert(word);
      }
    }
    uint64_t in_bank[kBanks] = {}, most = 1;
    for (uint64_t word : words) most = std::max(most, ++in_bank[word % kBanks]);
    counters.bank_conflicts += most - 1;
  }
}

void count_warp(const Thread* first, const Thread* last) {
  std::vector<LaneAccess> all;
  for (const Thread* thread = first; thread != last; ++thread) {
    std::unordered_map<const void*, uint32_t> turns;
    for (const AccessRecord& r : thread->accesses) all.push_back({r.site, turns[r.site]++, r});
  }
  std::stable_sort(all.begin(), all.end(), [](const LaneAccess& a, const LaneAccess& b) {
    return a.site != b.site ? a.site < b.site : a.turn < b.turn;
  });
  for (size_t begin = 0, end; begin < all.size(); begin = end) {
    for (end = begin + 1; end < all.size() && all[end].site == all[begin].site &&
                          all[end].turn == all[begin].turn;) {
      ++end;
    }
    (all[begin].record.kind == Access::kShared ? count_shared : count_global)(
        &all[begin], &all[begin] + (end - begin));
  }
}

}  // namespace

__attribute__((noinline)) void record(Access kind, const void* address, size_t size) {
  const uint64_t at = reinterpret_cast<uint64_t>(address);
  if (at % size != 0) fail("an access of " + std::to_string(size) + " bytes is not aligned");
  if (!settings.counting) return;
  block.running->accesses.push_back(
      {__builtin_return_address(0), at, static_cast<uint32_t>(size), kind});
}

void count_accesses() {
  if (!settings.counting) return;
  for (int first = 0; first < block.size; first += kLanes) {
    const Thread* threads = block.threads.data();
    count_warp(threads + first, threads + std::min(first + kLanes, block.size));
  }
}

void forget_cached() { cached.clear(); }

}  // namespace shim
