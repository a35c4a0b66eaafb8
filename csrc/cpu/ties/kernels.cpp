#include "cpu/ties/kernels.h"

#include "cpu/core/levels.h"
#include "cpu/ties/ties.h"

namespace pymerge::cpu {

const Kernels& kernels(const std::string& level) {
  const std::string name = pick_level(level);
#if defined(__x86_64__)
  if (name == kAvx512Kernels.name) return kAvx512Kernels;
  if (name == kAvx2Kernels.name) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace pymerge::cpu
