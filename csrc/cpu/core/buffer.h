// A tensor in memory, as every op of the CPU takes it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge::cpu {

// A tensor: contiguous elements from `data`, of any alignment. No data: there is no such tensor.
struct Buffer {
  const void* data = nullptr;
  DType type = DType::kFloat32;

  const void* at(uint64_t i) const { return static_cast<const char*>(data) + i * size_of(type); }
};

}  // namespace pymerge::cpu
