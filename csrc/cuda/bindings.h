// Python's view of csrc/cuda: the submodule `cuda` of pymerge._C.
#pragma once

#include <pybind11/pybind11.h>

namespace pymerge::cuda {

void bind(pybind11::module_& module);

}  // namespace pymerge::cuda
