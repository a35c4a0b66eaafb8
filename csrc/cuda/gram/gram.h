// Dot products and linear combinations on an NVIDIA GPU (docs/spec/gram.md): what the bindings
// call. Plain C++, without CUDA's headers.
//
// Every function enqueues its kernels on the caller's stream and returns; nothing is allocated. All
// memory is the device's, contiguous, the caller's until the stream has passed.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/core/place.h"

namespace pymerge::cuda {

// A model's row of the table: where it lies, and its dtype's code. The base's is the last, with
// address 0 where there is none.
struct GramInput {
  std::int64_t address = 0, dtype = 0;
};
static_assert(sizeof(GramInput) == 16);

struct GramCall {
  const GramInput* table = nullptr;  // [models + 1]
  int models = 0;
  bool has_base = false;
  std::int64_t rows = 0, columns = 0;
  bool by_column = false;
  bool wide = false;     // whether the working precision is binary64
  bool aligned = false;  // whether every row of every input begins on a 16-byte boundary

  std::int64_t groups() const { return by_column ? columns : rows; }
  int pairs() const { return models * (models + 1) / 2; }
  // Parts that a group's sums are cut into.
  std::int64_t parts() const;
};

// out[group][pairs], through sums[parts][groups][pairs]. Reads each input once for up to 8 models,
// and with more of them each pair of groups of 4 once.
void gram(const GramCall& call, double* sums, double* out, Place place);

// G5. coefficients: [groups][models]. out_aligned: as `aligned`, of the output.
void combine(const GramCall& call, const double* coefficients, void* out, DType out_dtype,
             bool out_aligned, Place place);

}  // namespace pymerge::cuda
