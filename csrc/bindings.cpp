// bindings.cpp - the module iv2kernels._C. Kernels take addresses and numbers in the order of their
// struct's fields (kernels.h): every field is 8 bytes, so a call is a copy. With one argument more,
// a stream, the kernel of csrc/cuda starts there. Python allocates and checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "cpu/isa.h"
#include "cuda/device.h"
#include "kernels.h"

namespace py = pybind11;
using namespace iv2;

namespace {

template <class Args>
struct Call {
  Args args;
  int64_t stream;  // of a GPU
};

template <class Args>
constexpr size_t kFields = sizeof(Args) / 8;

template <class Args>
Call<Args> unpack(const char* name, const py::args& values) {
  static_assert(sizeof(Args) % 8 == 0 && std::is_trivially_copyable_v<Args>,
                "kernel arguments are 8 bytes each");
  const size_t fields = kFields<Args>;
  if (values.size() != fields && values.size() != fields + 1) {
    throw py::type_error(std::string(name) + ": expected " + std::to_string(fields) +
                         " arguments, and on a GPU a stream, got " + std::to_string(values.size()));
  }
  Call<Args> call;
  char* field = reinterpret_cast<char*>(&call);
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
  return call;
}

struct CudaKernel {
  const char* name;
  int (*launch)(const void* args, void* stream);
};
#if defined(IV2_CUDA_ARCHS)
#define IV2_CUDA_ROW(name, Args)                                      \
  {#name, [](const void* args, void* stream) {                        \
     return iv2::cuda::name(*static_cast<const Args*>(args), stream); \
   }},
constexpr CudaKernel kCudaKernels[] = {IV2_CUDA_KERNELS(IV2_CUDA_ROW)};
#endif

// Null where csrc/cuda has no such kernel, or this build no csrc/cuda.
const CudaKernel* cuda_kernel(const char* name) {
#if defined(IV2_CUDA_ARCHS)
  for (const CudaKernel& kernel : kCudaKernels) {
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  }
#endif
  (void)name;
  return nullptr;
}

void launch(const CudaKernel* kernel, const char* name, const void* args, int64_t stream) {
  if (kernel == nullptr) {
    throw std::runtime_error(std::string(name) + ": this build has no CUDA kernel");
  }
  const int error = kernel->launch(args, reinterpret_cast<void*>(stream));
#if defined(IV2_CUDA_ARCHS)
  if (error != 0) {
    throw std::runtime_error(std::string(name) + ": CUDA: " + iv2::cuda::error_string(error));
  }
#else
  (void)error;
#endif
}

std::vector<std::string> cuda_kernels() {
  std::vector<std::string> names;
#if defined(IV2_CUDA_ARCHS)
  for (const CudaKernel& kernel : kCudaKernels) names.push_back(kernel.name);
#endif
  return names;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(IV2_CUDA_ARCHS)
  info["cuda"] = iv2::cuda::runtime_version();
  info["cuda_archs"] = IV2_CUDA_ARCHS;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of iv2kernels. Private: use iv2kernels.";
#define IV2_BIND(name, Args)                                           \
  m.def(#name, [kernel = cuda_kernel(#name)](const py::args& values) { \
    const auto call = unpack<Args>(#name, values);                     \
    const bool on_gpu = values.size() > kFields<Args>;                 \
    py::gil_scoped_release release;                                    \
    if (on_gpu)                                                        \
      launch(kernel, #name, &call.args, call.stream);                  \
    else                                                               \
      iv2::cpu::table().name(call.args);                               \
  });
  IV2_KERNELS(IV2_BIND)
  m.def("cuda_kernels", &cuda_kernels);
  m.def("row_chunks", &iv2::row_chunks);
  m.def("cuda_row_chunks", &iv2::cuda_row_chunks);
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
  m.def("build_info", &build_info);
  iv2::cpu::isa();  // an unknown IV2_ISA is an ImportError that says so
}
