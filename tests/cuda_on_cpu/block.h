// block.h - the block that runs now, for the engine's own files (engine.cpp, warp.cpp,
// traffic.cpp).
#pragma once
#include <vector>

#include "engine.h"
#include "fiber.h"

namespace shim {

constexpr int kLanes = 32, kMeetings = 16;
constexpr size_t kSlot = 48;  // bytes that a lane brings to a meeting, at most

// Lanes of a warp that exchange values.
struct Meeting {
  unsigned lanes = 0, arrived = 0, to_leave = 0;
  Site site;
  alignas(16) unsigned char in[kLanes][kSlot], out[kLanes][kSlot];
};
struct Warp {
  Meeting meetings[kMeetings];
};

struct AccessRecord {
  const void* site;
  uint64_t address;
  uint32_t size;
  Access kind;
};

struct Thread {
  Position place;
  Fiber fiber;
  bool done;
  std::vector<Copy> copies;    // in the order of copy_begin, of which `landed` have,
  std::vector<size_t> groups;  // and how many there were at each copy_commit
  size_t landed;
  std::vector<AccessRecord> accesses;
};

// What ThreadSanitizer takes for synchronisation: a cell for the start of a block, one for its end,
// two for its barriers and one for each meeting. Barriers take turns with two cells: a fast thread
// that is already at the next must not seem ordered before a slow one that still leaves the last.
struct Cells {
  uint64_t start, end, barrier[2];
  uint64_t meeting[kMaxThreads / kLanes][kMeetings];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int size = 0, alive = 0;
  Thread* running = nullptr;
  Fiber main;
  std::vector<int> ready;  // a ring of threads that may run
  size_t first_ready = 0, num_ready = 0;
  std::vector<int> at_barrier;
  Site barrier_site;
  unsigned barriers = 0;  // that the block has passed
  Cells* cells = nullptr;
  const std::function<void()>* kernel = nullptr;
};
extern Block block;

// Lets other threads run until someone wakes this one.
void wait();
// Makes threads ready, in the order of the settings.
void wake(std::vector<int>& threads);

// Adds the accesses of the block's threads to the counters; forget_cached starts a launch.
void count_accesses();
void forget_cached();

}  // namespace shim
