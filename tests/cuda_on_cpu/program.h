// program.h - a set of kernels by name: registry.cpp has the product's, faults.cu those of the
// net's own tests.
#pragma once
#include <cstdint>

// Fields of the kernel's argument struct in order, 8 bytes each. 0, or 1 with shim_error().
extern "C" int run_kernel(const char* name, const int64_t* fields, int64_t count);

extern "C" const char* shim_error();
extern "C" void shim_configure(int order, unsigned seed, int counting);
// The seven counters of engine.h since the last call.
extern "C" void shim_counters(uint64_t* values);
