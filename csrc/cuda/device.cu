// device.cu - the runtime's messages and version. It has no kernel.
#include <cuda_runtime.h>

#include "device.h"

namespace iv2::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int runtime_version() { return CUDART_VERSION; }

}  // namespace iv2::cuda
