// bindings.cpp - the module iv2kernels._C. Kernels take addresses and numbers in the order of their
// struct's fields (kernels.h): every field is 8 bytes, so a call is a copy. Python allocates and
// checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "cpu/isa.h"
#include "kernels.h"

namespace py = pybind11;
using namespace iv2;

namespace {

template <class Args>
Args unpack(const char* name, const py::args& values) {
  static_assert(sizeof(Args) % 8 == 0 && std::is_trivially_copyable_v<Args>,
                "kernel arguments are 8 bytes each");
  if (values.size() * 8 != sizeof(Args)) {
    throw py::type_error(std::string(name) + ": expected " + std::to_string(sizeof(Args) / 8) +
                         " arguments, got " + std::to_string(values.size()));
  }
  Args args;
  char* field = reinterpret_cast<char*>(&args);
  for (py::handle value : values) {
    if (PyFloat_Check(value.ptr())) {
      const double number = PyFloat_AS_DOUBLE(value.ptr());
      std::memcpy(field, &number, 8);
    } else {
      const int64_t number = value.is_none() ? 0 : value.cast<int64_t>();
      std::memcpy(field, &number, 8);
    }
    field += 8;
  }
  return args;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of iv2kernels. Private: use iv2kernels.";
#define IV2_BIND(name, Args)                       \
  m.def(#name, [](const py::args& values) {        \
    const Args args = unpack<Args>(#name, values); \
    py::gil_scoped_release release;                \
    iv2::cpu::table().name(args);                  \
  });
  IV2_KERNELS(IV2_BIND)
  m.def("row_chunks", &iv2::row_chunks);
  m.def("pair_blocks", &iv2::pair_blocks);
  m.def("pair_strip_scratch", &iv2::pair_strip_scratch);
  m.def("pair_tile_scratch", &iv2::pair_tile_scratch);
  m.attr("attention_queries") = iv2::kAttentionQueries;
  m.attr("attention_block") = iv2::kAttentionBlock;
  m.attr("hard_negatives_rows") = iv2::kHardNegativesRows;
  m.attr("hard_negatives_columns") = iv2::kHardNegativesColumns;
  m.def("attention_fwd_scratch", &iv2::attention_fwd_scratch);
  m.def("attention_bwd_scratch", &iv2::attention_bwd_scratch);
  m.def("attention_bwd_is_long", &iv2::attention_bwd_is_long);
  m.def("attention_key_chunks", &iv2::attention_key_chunks);
  m.def("isa", &iv2::cpu::isa);
  m.def("set_isa", &iv2::cpu::set_isa);
  m.def("available_isas", &iv2::cpu::available_isas);
  m.def("built_isas", &iv2::cpu::built_isas);
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["cuda"] = false;
    return info;
  });
  iv2::cpu::isa();  // an unknown IV2_ISA is an ImportError that says so
}
