// device.h - what bindings.cpp needs of the CUDA runtime besides the kernels.
#pragma once

namespace iv2::cuda {
const char* error_string(int error);
int runtime_version();  // 13000 is 13.0
}  // namespace iv2::cuda
