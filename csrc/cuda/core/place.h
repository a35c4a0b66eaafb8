// Where kernels run. Plain C++, without CUDA's headers.
#pragma once

#include <cstdint>
#include <string>

namespace pymerge::cuda {

// stream: a cudaStream_t of that device, as an integer.
struct Place {
  int device = 0;
  int processors = 1;  // multiprocessors of the device, for the size of grids
  std::uintptr_t stream = 0;
};

// Why no kernel of this build can run here (no driver, no device, no code for the device), or an
// empty string.
std::string why_not();

}  // namespace pymerge::cuda
