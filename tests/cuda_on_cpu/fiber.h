// fiber.h - a stack of its own and the switch to it: what a CUDA thread is on the CPU.
// AddressSanitizer and ThreadSanitizer are told of every switch (SHIM_ASAN, SHIM_TSAN), so that
// they see each fiber as a thread.
#pragma once
#include <cstddef>
#if !defined(__x86_64__) || defined(SHIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace shim {

struct Fiber {
  char* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
  void* stack_pointer = nullptr;
#if !defined(__x86_64__) || defined(SHIM_UCONTEXT)
  ucontext_t context;
#endif
};

// Fresh memory from the system, which no sanitizer has seen before.
char* map_memory(size_t size);
void unmap_memory(char* memory, size_t size);

// The fiber that the program itself runs on.
void adopt_main(Fiber& fiber);
// `fiber`, with its stack set, will run entry() when first switched to; entry never returns.
void prepare(Fiber& fiber, void (*entry)());
// Leaves `from`, for good if `ends`, and goes on where `to` was left.
void switch_fiber(Fiber& from, Fiber& to, bool ends);
// The first call of every entry().
void entered();
// Frees what prepare made, once the fiber will not run again.
void discard(Fiber& fiber);

// What happened before release(object) in one fiber is visible after acquire(object) in another.
void release(void* object);
void acquire(void* object);

}  // namespace shim
