// The host's side of a device. All return without waiting.
#pragma once

#include "cuda/core/device.cuh"
#include "cuda/core/place.h"

namespace pymerge::cuda {

// The calling thread's device while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Device memory that is to be zero: 64-bit words.
struct Blank {
  std::uint64_t* begin = nullptr;
  std::int64_t words = 0;
};

// prepare.cu: `bytes` of tables, a multiple of 16, from the host to `to`; the two blanks become 0.
void launch_prepare(const void* tables, std::size_t bytes, void* to, Blank scratch, Blank stats,
                    cudaStream_t stream);

}  // namespace pymerge::cuda
