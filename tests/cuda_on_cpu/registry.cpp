// registry.cpp - the kernels of csrc/cuda by name.
#include <cstring>

#include "../../csrc/kernels.h"
#include "engine.h"
#include "program.h"

namespace {

template <class Args>
int run(const char* name, int (*kernel)(const Args&, void*), const int64_t* fields, int64_t count) {
  if (count * 8 != static_cast<int64_t>(sizeof(Args))) {
    shim::last_error = std::string(name) + " takes " + std::to_string(sizeof(Args) / 8) +
                       " fields, got " + std::to_string(count);
    return 1;
  }
  Args args;
  std::memcpy(&args, fields, sizeof(Args));
  return kernel(args, nullptr);
}

}  // namespace

extern "C" int run_kernel(const char* name, const int64_t* fields, int64_t count) {
#define IV2_RUN(kernel, Args) \
  if (std::strcmp(name, #kernel) == 0) return run(name, &iv2::cuda::kernel, fields, count);
  IV2_CUDA_KERNELS(IV2_RUN)
  shim::last_error = std::string("there is no CUDA kernel ") + name;
  return 1;
}

extern "C" int64_t cuda_row_chunks(int64_t rows) { return iv2::cuda_row_chunks(rows); }
