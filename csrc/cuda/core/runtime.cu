// The few questions to the CUDA runtime itself.

#include "cuda/core/runtime.h"

#include "cuda/core/architectures.h"

namespace pymerge::cuda {

#if defined(PYMERGE_EMULATE)

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;
std::string why_not() { return ""; }

#else

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { static_cast<void>(cudaSetDevice(before_)); }

std::string why_not() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  std::string others;
  for (int device = 0; error == cudaSuccess && device < count; ++device) {
    int major = 0, minor = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) break;
    if (runs(PYMERGE_CUDA_CODES, major, minor)) return "";
    others += (device ? ", " : "") + std::to_string(major) + "." + std::to_string(minor);
  }
  if (error == cudaSuccess && count > 0) {
    return "the CUDA kernels were compiled for " PYMERGE_CUDA_CODES
           ", the devices' compute capability is " +
           others + "; build with PYMERGE_CUDA_ARCHS set to it";
  }
  static_cast<void>(cudaGetLastError());
  return error == cudaSuccess
             ? "no CUDA device is visible"
             : std::string("no CUDA device is usable: ") + cudaGetErrorString(error);
}

#endif

}  // namespace pymerge::cuda
