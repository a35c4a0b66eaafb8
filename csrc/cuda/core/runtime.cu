// The few questions to the CUDA runtime itself.

#include "cuda/core/runtime.h"

namespace pymerge::cuda {

#if defined(PYMERGE_EMULATE)

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;
std::string why_not() { return ""; }

#else

namespace {
__global__ void probe() {}
}  // namespace

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { static_cast<void>(cudaSetDevice(before_)); }

std::string why_not() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess) return "";
    static_cast<void>(cudaGetLastError());
    return std::string("the CUDA kernels were not compiled for this device (") +
           cudaGetErrorString(error) +
           "); build with PYMERGE_CUDA_ARCHS set to its compute capability";
  }
  static_cast<void>(cudaGetLastError());
  return error == cudaSuccess
             ? "no CUDA device is visible"
             : std::string("no CUDA device is usable: ") + cudaGetErrorString(error);
}

#endif

}  // namespace pymerge::cuda
