// replay.cpp - one call of a kernel that shim.py has written to a file, under a sanitizer: every
// buffer is an allocation of exactly its size, so that the first byte beyond is seen. Usage: replay
// CALL RESULT. The files are 8-byte numbers and bytes: see shim.py, Kernels._replay.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "program.h"

namespace {

struct Buffer {
  char* memory;  // the bytes follow `offset` others, which give them their alignment
  uint64_t offset, size;
};

FILE* open(const char* path, const char* mode) {
  FILE* file = std::fopen(path, mode);
  if (file == nullptr) std::abort();
  return file;
}
void read(FILE* file, void* to, size_t size) {
  if (size && std::fread(to, 1, size, file) != size) std::abort();
}
uint64_t read_number(FILE* file) {
  uint64_t number;
  read(file, &number, 8);
  return number;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  FILE* call = open(arguments[1], "rb");
  const int order = static_cast<int>(read_number(call));
  std::string name(read_number(call), ' ');
  read(call, name.data(), name.size());
  std::vector<Buffer> buffers(read_number(call));
  for (Buffer& buffer : buffers) {
    buffer.offset = read_number(call);
    buffer.size = read_number(call);
    buffer.memory = static_cast<char*>(std::malloc(buffer.offset + buffer.size));
    read(call, buffer.memory + buffer.offset, buffer.size);
  }
  std::vector<int64_t> fields(read_number(call));
  for (int64_t& field : fields) {
    const bool is_buffer = read_number(call) != 0;
    field = static_cast<int64_t>(read_number(call));
    if (is_buffer) {
      const Buffer& buffer = buffers[static_cast<size_t>(field)];
      field = reinterpret_cast<int64_t>(buffer.memory + buffer.offset);
    }
  }
  std::fclose(call);

  shim_configure(order, 1, 0);
  if (run_kernel(name.c_str(), fields.data(), static_cast<int64_t>(fields.size())) != 0) {
    std::fprintf(stderr, "%s: %s\n", name.c_str(), shim_error());
    std::_Exit(3);
  }
  FILE* result = open(arguments[2], "wb");
  for (const Buffer& buffer : buffers) {
    std::fwrite(buffer.memory + buffer.offset, 1, buffer.size, result);
    std::free(buffer.memory);
  }
  std::fclose(result);
  return 0;
}
