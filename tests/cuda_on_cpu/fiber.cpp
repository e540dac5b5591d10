// fiber.cpp - on x86-64 a switch is fifteen instructions, about 5 ns; elsewhere, or with
// SHIM_UCONTEXT, it is swapcontext, a hundred times slower.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#if defined(SHIM_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SHIM_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace shim {
namespace {

Fiber* left = nullptr;  // the fiber that the last switch left

#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)

extern "C" void shim_swap(void** save, void* load);
__asm__(
    ".text\n"
    ".globl shim_swap\n"
    ".type shim_swap, @function\n"
    "shim_swap:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size shim_swap, . - shim_swap\n");

void first_frame(Fiber& fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_size - 64);
  *--top = nullptr;  // entry's return address, never used
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}
void swap(Fiber& from, Fiber& to) { shim_swap(&from.stack_pointer, to.stack_pointer); }

#else

void first_frame(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}
void swap(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace

char* map_memory(size_t size) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<char*>(memory);
}
void unmap_memory(char* memory, size_t size) { munmap(memory, size); }

void adopt_main(Fiber& fiber) {
#if defined(SHIM_TSAN)
  fiber.tsan = __tsan_get_current_fiber();
#endif
  (void)fiber;
}

void prepare(Fiber& fiber, void (*entry)()) {
  first_frame(fiber, entry);
  fiber.fake_stack = nullptr;
#if defined(SHIM_TSAN)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

void discard(Fiber& fiber) {
#if defined(SHIM_TSAN)
  __tsan_destroy_fiber(fiber.tsan);
#endif
  (void)fiber;
}

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
  left = &from;
#if defined(SHIM_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(SHIM_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)ends;
  swap(from, to);
#if defined(SHIM_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered() {
#if defined(SHIM_ASAN)
  const void* stack = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (left->stack == nullptr) {  // the program's own, which only AddressSanitizer knows
    left->stack = static_cast<char*>(const_cast<void*>(stack));
    left->stack_size = size;
  }
#endif
}

void release(void* object) {
#if defined(SHIM_TSAN)
  __tsan_release(object);
#endif
  (void)object;
}
void acquire(void* object) {
#if defined(SHIM_TSAN)
  __tsan_acquire(object);
#endif
  (void)object;
}

}  // namespace shim
