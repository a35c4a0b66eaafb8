// The submodule `cuda` of pymerge._C, over kernels that run on the host.
#include "cuda/bindings.h"

PYBIND11_MODULE(pymerge_cuda_emulated, module) { pymerge::cuda::bind(module); }
