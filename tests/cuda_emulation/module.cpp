// The submodule `cuda` of pymerge._C, over kernels that run on the host.
#include <utility>

#include "cuda/bindings.h"
#include "cuda/core/architectures.h"
#include "cuda/ties/fast.cuh"
#include "emulate.h"

// How many of the numbers with bits first to last give another quotient than IEEE division.
static std::uint32_t wrong_quotients(int count, std::uint32_t first, std::uint32_t last) {
  static float reciprocal[pymerge::cuda::kReciprocals];
  for (int j = 0; j < pymerge::cuda::kReciprocals; ++j)
    reciprocal[j] = pymerge::cuda::reciprocal_at(j);
  const auto by = static_cast<float>(count);
  std::uint32_t wrong = 0;
  for (std::uint64_t bits = first; bits <= last; ++bits) {
    const float total = pymerge::bits_float(static_cast<std::uint32_t>(bits));
    const float quotient = pymerge::cuda::divide_by_count(total, by, reciprocal);
    wrong += pymerge::float_bits(quotient) != pymerge::float_bits(total / by);
  }
  return wrong;
}

PYBIND11_MODULE(pymerge_cuda_emulated, module) {
  pymerge::cuda::bind(module);
  module.def(
      "launches", [] { return std::exchange(emulate::launches(), 0); },
      "Launches since it was last asked.");
  module.def("wrong_quotients", &wrong_quotients);
  module.def("runs", &pymerge::cuda::runs);
}
