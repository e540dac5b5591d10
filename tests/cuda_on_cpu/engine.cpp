// engine.cpp - blocks, their threads' turns, barriers and shared memory. Threads change only where
// one waits: what a kernel does between two barriers happens thread after thread, in the order of
// the settings, and a missing barrier shows as NaN or as another result in another order. Under
// ThreadSanitizer every block has new stacks, shared memory and cells, so that no address and no
// synchronisation is common to two blocks but the kernel's own.
#include "engine.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "block.h"

#if defined(SHIM_ASAN)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace shim {

Settings settings;
Counters counters;
Position* position = nullptr;
std::string last_error;
Block block;

namespace {

#if defined(SHIM_ASAN)
constexpr size_t kStack = 256 * 1024;
void forbid(void* memory, size_t size) { __asan_poison_memory_region(memory, size); }
void allow(void* memory, size_t size) { __asan_unpoison_memory_region(memory, size); }
#else
constexpr size_t kStack = 64 * 1024;
void forbid(void*, size_t) {}
void allow(void*, size_t) {}
#endif
#if defined(SHIM_TSAN)
constexpr bool kFresh = true;
#else
constexpr bool kFresh = false;
#endif

constexpr size_t kApart = 128;  // between arrays, where AddressSanitizer forbids access
constexpr size_t kArena = 2 * kMaxStaticShared;

struct Memory {
  char* start;
  size_t size;
};
// What a launch has mapped; `used` of each kind serve the present block.
struct Pool {
  std::vector<Memory> memories;
  size_t used = 0;

  char* take(size_t size) {
    if (used < memories.size() && memories[used].size != size) give_back();
    if (used == memories.size()) memories.push_back({map_memory(size), size});
    return memories[used++].start;
  }
  void next_block() {
    if (!kFresh) used = 0;
  }
  void give_back() {
    for (const Memory& memory : memories) {
      allow(memory.start, memory.size);
      unmap_memory(memory.start, memory.size);
    }
    memories.clear();
    used = 0;
  }
};
Pool stacks, arenas, dynamics, cells;
// Under ThreadSanitizer, of earlier blocks: it knows 8128 threads at a time, and those that are
// gone less well.
std::vector<Fiber> ended;
constexpr size_t kMaxEnded = 4096;
std::mt19937 random_order;

struct Array {
  const void* tag;
  char* start;
};
std::vector<Array> arrays;
char* arena;
size_t arena_used, array_bytes;
char* dynamic;
size_t dynamic_bytes;

void fill_with_nan(char* memory, size_t size) {
  // not memset, which ThreadSanitizer watches
  for (size_t i = 0; i < size; ++i) static_cast<volatile char*>(memory)[i] = '\xFF';
}

template <class T>
void put_in_order(std::vector<T>& items) {
  if (settings.order == kRandom) {
    std::shuffle(items.begin(), items.end(), random_order);
  } else {
    std::sort(items.begin(), items.end());
    if (settings.order == kReverse) std::reverse(items.begin(), items.end());
  }
}

void switch_to(Thread* to, bool ends) {
  Fiber& from = block.running ? block.running->fiber : block.main;
  block.running = to;
  position = to ? &to->place : nullptr;
  switch_fiber(from, to ? to->fiber : block.main, ends);
}

Thread* next_ready() {
  if (block.num_ready == 0) return nullptr;
  Thread* thread = &block.threads[block.ready[block.first_ready]];
  block.first_ready = (block.first_ready + 1) % block.ready.size();
  --block.num_ready;
  return thread;
}

void thread_entry() {
  entered();
  Thread& me = *block.running;
  acquire(&block.cells->start);
  (*block.kernel)();
  release(&block.cells->end);
  if (me.landed != me.copies.size()) fail("a thread returned with copies it did not wait for");
  me.done = true;
  --block.alive;
  if (!block.at_barrier.empty()) fail("a thread returned while others wait at a barrier");
  Thread* next = next_ready();
  if (next == nullptr && block.alive > 0) fail("a thread returned and all others wait");
  switch_to(next, true);
  std::abort();
}

void prepare_memory(size_t dynamic_size) {
  for (Pool* pool : {&stacks, &arenas, &dynamics, &cells}) pool->next_block();
  arena = arenas.take(kArena);
  forbid(arena, kArena);
  arrays.clear();
  arena_used = array_bytes = 0;
  dynamic_bytes = dynamic_size;
  dynamic = dynamics.take(dynamic_size + kApart);
  allow(dynamic, dynamic_size);
  fill_with_nan(dynamic, dynamic_size);
  forbid(dynamic + dynamic_size, kApart);
  counters.shared_bytes = std::max<uint64_t>(counters.shared_bytes, dynamic_size);
  block.cells = reinterpret_cast<Cells*>(cells.take(sizeof(Cells)));
}

void discard_ended() {
  for (Fiber& fiber : ended) discard(fiber);
  ended.clear();
}

void run_block(dim3 index, dim3 size, dim3 grid, size_t dynamic_size) {
  prepare_memory(dynamic_size);
  block.size = block.alive = static_cast<int>(size.x * size.y * size.z);
  block.threads.resize(block.size);
  block.warps.resize((block.size + kLanes - 1) / kLanes);
  for (Warp& warp : block.warps) {  // a launch that failed left some
    for (Meeting& meeting : warp.meetings) meeting.lanes = meeting.to_leave = 0;
  }
  block.ready.resize(block.size);
  block.first_ready = block.num_ready = 0;
  block.at_barrier.clear();
  block.at_barrier.reserve(block.size);
  block.barriers = 0;
  release(&block.cells->start);
  std::vector<int> all(block.size);
  std::iota(all.begin(), all.end(), 0);
  for (int t : all) {
    Thread& thread = block.threads[t];
    const unsigned u = static_cast<unsigned>(t);
    thread.place = {dim3(u % size.x, u / size.x % size.y, u / (size.x * size.y)), index, size, grid,
                    t};
    thread.done = false;
    thread.copies.clear();
    thread.groups.clear();
    thread.landed = 0;
    thread.accesses.clear();
    thread.fiber.stack = stacks.take(kStack);
    thread.fiber.stack_size = kStack;
    allow(thread.fiber.stack, kStack);  // what the last to end on it left
    prepare(thread.fiber, thread_entry);
  }
  wake(all);
  switch_to(next_ready(), false);
  counters.barriers += block.barriers;
  count_accesses();
  for (Thread& thread : block.threads) {
    if (kFresh) {
      ended.push_back(thread.fiber);
    } else {
      discard(thread.fiber);
    }
  }
  if (ended.size() > kMaxEnded) discard_ended();
}

std::string what_is_wrong(dim3 grid, dim3 size, size_t dynamic_size) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > kMaxThreads) return "a block must have 1 to 1024 threads";
  if (uint64_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return "a grid must have 1 to 2^31 - 1, 65535 and 65535 blocks";
  if (dynamic_size > kMaxDynamicShared) return "too much dynamic shared memory";
  return "";
}

std::string text(dim3 v) {
  return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
}

}  // namespace

int launch(dim3 grid, dim3 size, size_t dynamic_size, const std::function<void()>& kernel) {
  last_error = what_is_wrong(grid, size, dynamic_size);
  if (!last_error.empty()) return 1;
  random_order.seed(settings.seed);
  forget_cached();
  adopt_main(block.main);
  block.kernel = &kernel;
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  put_in_order(blocks);
  for (uint64_t i : blocks) {
    const dim3 index(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y));
    run_block(index, size, grid, dynamic_size);
    if (!last_error.empty()) break;
  }
  // only now: acquired before the next block started, the end of one would order the two
  for (const Memory& memory : cells.memories) {
    acquire(&reinterpret_cast<Cells*>(memory.start)->end);
  }
  discard_ended();
  for (Pool* pool : {&stacks, &arenas, &dynamics, &cells}) pool->give_back();
  return last_error.empty() ? 0 : 1;
}

void fail(const std::string& what) {
  if (last_error.empty()) {
    last_error =
        what + " (block " + text(position->block) + ", thread " + text(position->thread) + ")";
  }
  switch_to(nullptr, false);
  std::abort();
}

void wait() {
  Thread* next = next_ready();
  if (next == nullptr) {
    fail(
        "deadlock: every thread waits, at a barrier not all come to or for lanes that do not come");
  }
  if (next != block.running) switch_to(next, false);
}

void wake(std::vector<int>& threads) {
  put_in_order(threads);
  for (int thread : threads) {
    block.ready[(block.first_ready + block.num_ready++) % block.ready.size()] = thread;
  }
  threads.clear();
}

void sync_block(Site site) {
  const unsigned turn = block.barriers % 2;
  release(&block.cells->barrier[turn]);
  if (!block.at_barrier.empty() && block.barrier_site.line != site.line) {
    fail("threads of a block wait at two barriers: lines " +
         std::to_string(block.barrier_site.line) + " and " + std::to_string(site.line) + " of " +
         site.file);
  }
  if (block.alive < block.size) fail("a barrier after a thread of the block has returned");
  block.barrier_site = site;
  block.at_barrier.push_back(block.running->place.index);
  if (static_cast<int>(block.at_barrier.size()) == block.size) {
    ++block.barriers;
    wake(block.at_barrier);  // this thread too: it takes its turn
  }
  wait();
  acquire(&block.cells->barrier[turn]);
}

void* static_shared(const void* tag, size_t size) {
  for (const Array& array : arrays) {
    if (array.tag == tag) return array.start;
  }
  array_bytes += size;
  if (arena_used + size > kArena || array_bytes > kMaxStaticShared) {
    fail("too much static shared memory");
  }
  char* start = arena + arena_used;
  arena_used += (size + 2 * kApart - 1) / kApart * kApart;
  arrays.push_back({tag, start});
  allow(start, size);
  fill_with_nan(start, size);
  counters.shared_bytes = std::max<uint64_t>(counters.shared_bytes, array_bytes + dynamic_bytes);
  return start;
}

void* dynamic_shared() { return dynamic; }

void copy_begin(const Copy& copy) { block.running->copies.push_back(copy); }
void copy_commit() { block.running->groups.push_back(block.running->copies.size()); }
bool copy_landing(int groups_left, Copy* copy) {
  Thread& me = *block.running;
  const size_t left = static_cast<size_t>(groups_left);
  if (me.groups.size() <= left || me.landed >= me.groups[me.groups.size() - 1 - left]) return false;
  *copy = me.copies[me.landed++];
  return true;
}

}  // namespace shim
