// Adds a low-rank update to rows of a weight (docs/spec/low_rank.md).
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace pymerge::cpu {

// out = base + scale (left right), row by row, on the calling thread. base: (rows, columns) of
// `type`. out: the same in the working precision, which is that of left and right: binary64 where
// `wide`, else binary32. left: (rows, rank), contiguous. right: rank rows of `columns` elements,
// `stride` elements apart. All at any alignment; out overlaps nothing.
void add_low_rank(const void* base, DType type, const void* left, const void* right,
                  uint64_t stride, uint64_t rank, double scale, bool wide, void* out, uint64_t rows,
                  uint64_t columns, const std::string& level);

}  // namespace pymerge::cpu
