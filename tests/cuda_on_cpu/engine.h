// engine.h - CUDA's model of execution on one CPU thread: blocks run one after the other, a block's
// threads are fibers that run until they wait for others. Shared memory is full of NaN when a block
// starts. on_cpu.h builds the names that kernels use on this; nothing else includes it but the
// programs that launch kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

// In which order threads that may run do, and blocks.
enum Order : int { kForward = 0, kReverse = 1, kRandom = 2 };
struct Settings {
  int order = kForward;
  unsigned seed = 1;
  bool counting = false;  // fill `counters` below
};
extern Settings settings;

struct Counters {
  uint64_t read;             // bytes of 32-byte sectors that warps read, each time they do,
  uint64_t read_cached;      // the same of read_cached, each sector once a launch,
  uint64_t written;          // and of writes
  uint64_t bank_conflicts;   // turns that warps waited for a bank of shared memory
  uint64_t barriers;         // of a block, by block
  uint64_t matrix_products;  // of mma, by warp
  uint64_t shared_bytes;     // the most that a block had
};
extern Counters counters;

// Where in the source a thread waits.
struct Site {
  const char* file;
  int line;
};

struct Position {
  dim3 thread, block, block_size, grid;
  int index;  // of the thread in its block
};
extern Position* position;  // the running thread's

constexpr size_t kMaxStaticShared = 48 * 1024, kMaxDynamicShared = 227 * 1024;
constexpr unsigned kMaxThreads = 1024;

// Runs kernel() in every thread. 0, or 1 with what went wrong in last_error.
int launch(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& kernel);
extern std::string last_error;

// Ends the launch.
[[noreturn]] void fail(const std::string& what);

void sync_block(Site site);
void sync_warp(unsigned lanes, Site site);
// *value becomes that of lane `source`; its own if that lane is not among `lanes`.
void shuffle(unsigned lanes, void* value, size_t size, int source, Site site);
unsigned ballot(unsigned lanes, bool yes, Site site);
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16, Site site);
// `row` is what lies at this lane's address.
void ldmatrix(uint32_t (&tiles)[4], const uint16_t (&row)[8], const void* address, bool transposed,
              Site site);

// The block's array of a declaration in the source, which `tag` stands for.
void* static_shared(const void* tag, size_t size);
void* dynamic_shared();

// Copies under way: they land, in the caller's hands, when they are waited for, not before.
struct Copy {
  void* shared;
  const void* global;
  bool valid;
};
void copy_begin(const Copy& copy);
void copy_commit();
bool copy_landing(int groups_left, Copy* copy);  // false when no more need to land

enum class Access { kRead, kReadCached, kWrite, kShared };
// Calls from one place in the code, by the lanes of a warp, belong together in order.
void record(Access kind, const void* address, size_t size);

}  // namespace shim
