// The submodule `cuda` of pymerge._C, over kernels that run on the host.
#include <utility>

#include "cuda/bindings.h"
#include "emulate.h"

PYBIND11_MODULE(pymerge_cuda_emulated, module) {
  pymerge::cuda::bind(module);
  module.def(
      "launches", [] { return std::exchange(emulate::launches(), 0); },
      "Launches since it was last asked.");
}
