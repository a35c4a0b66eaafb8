// How many elements are NaN or infinite.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace pymerge::cpu {

// Of n contiguous elements at any alignment, each read once. Little work is done by the caller
// alone.
uint64_t count_non_finite(const void* data, DType type, uint64_t n, int threads,
                          const std::string& level);

}  // namespace pymerge::cpu
