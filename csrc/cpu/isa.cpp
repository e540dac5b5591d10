// isa.cpp - picks the widest build of the kernels that this machine runs. IV2_ISA caps the choice
// at load; set_isa switches it, for tests and bench. This file is compiled for the baseline
// machine.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#include "../kernels.h"

namespace iv2::cpu {
namespace {

struct Isa {
  const char* name;
  bool runs;
  Kernels kernels;
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#define IV2_ROW_scalar(name, Args) &scalar::name,
#define IV2_ROW_avx2(name, Args) &avx2::name,
#define IV2_ROW_avx512(name, Args) &avx512::name,
#define IV2_ROW_avx512_bf16(name, Args) &avx512_bf16::name,

std::vector<Isa>& isas() {
  static std::vector<Isa> all = {
      {"scalar", true, {IV2_KERNELS(IV2_ROW_scalar)}},
#if defined(IV2_HAVE_AVX2)
      {"avx2", has_avx2(), {IV2_KERNELS(IV2_ROW_avx2)}},
#endif
#if defined(IV2_HAVE_AVX512)
      {"avx512", has_avx512(), {IV2_KERNELS(IV2_ROW_avx512)}},
#endif
#if defined(IV2_HAVE_AVX512_BF16)
      {"avx512_bf16",
       has_avx512() && __builtin_cpu_supports("avx512bf16"),
       {IV2_KERNELS(IV2_ROW_avx512_bf16)}},
#endif
  };
  return all;
}

const Isa* at_load() {
  const char* cap = std::getenv("IV2_ISA");
  bool known = cap == nullptr || *cap == '\0';
  const Isa* best = nullptr;
  const bool uncapped = known;
  for (const Isa& isa : isas()) {
    const bool is_cap = !uncapped && std::string(cap) == isa.name;
    if (isa.runs && (uncapped || !known || is_cap)) best = &isa;
    known = known || is_cap;
  }
  if (!known) {
    throw std::invalid_argument("IV2_ISA must be one of scalar, avx2, avx512, avx512_bf16, got " +
                                std::string(cap));
  }
  return best;
}

const Isa*& current() {
  static const Isa* chosen = at_load();
  return chosen;
}

}  // namespace

const Kernels& table() { return current()->kernels; }
std::string isa() { return current()->name; }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.runs) names.push_back(isa.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string available;
  for (const Isa& isa : isas()) {
    if (isa.runs && name == isa.name) {
      current() = &isa;
      return;
    }
    if (isa.runs) available += (available.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("set_isa: name must be one of " + available + ", got " + name);
}

}  // namespace iv2::cpu
