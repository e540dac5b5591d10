// control.cpp - the engine's settings and results for Python and replay.cpp.
#include <cstring>

#include "engine.h"
#include "program.h"

extern "C" const char* shim_error() { return shim::last_error.c_str(); }

extern "C" void shim_configure(int order, unsigned seed, int counting) {
  shim::settings = {order, seed, counting != 0};
}

extern "C" void shim_counters(uint64_t* values) {
  std::memcpy(values, &shim::counters, sizeof(shim::counters));
  shim::counters = {};
}
