// Dot products of task vectors, and their linear combinations with coefficients of rows or columns
// (docs/spec/gram.md). Each reads every input once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "cpu/core/buffer.h"

namespace pymerge::cpu {

// G1: a tensor of `rows` times `columns` elements in row-major order, models that share its shape.
struct GramShape {
  uint64_t rows, columns;
  int threads;
  std::string level;
};

// G2, G3: pairs (i, j), i <= j, in the order (0, 0), (0, 1), ..., (1, 1), ... of each row to
// out[rows][pairs]. One row of all elements is the whole tensor. The bits depend neither on the
// threads nor on the level.
void gram_rows(const GramShape&, const std::vector<Buffer>& models, const Buffer& base,
               double* out);

// The same of each column, to out[columns][pairs]. Scratch: columns * pairs for each 4096 rows.
void gram_columns(const GramShape&, const std::vector<Buffer>& models, const Buffer& base,
                  double* out);

// G5: out = cast(base + sum_k c_k (x_k - base)), c_k of the row, coefficients[rows][models], or of
// the column, coefficients[models][columns].
void combine_rows(const GramShape&, const std::vector<Buffer>& models, const Buffer& base,
                  const double* coefficients, void* out, DType out_type);
void combine_columns(const GramShape&, const std::vector<Buffer>& models, const Buffer& base,
                     const double* coefficients, void* out, DType out_type);

}  // namespace pymerge::cpu
