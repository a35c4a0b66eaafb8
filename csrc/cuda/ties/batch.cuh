// A batch as the kernels read it: T1, and which of its tensors a tile belongs to.
#pragma once

#include "cuda/core/device.cuh"
#include "cuda/ties/batch.h"

namespace pymerge::cuda {

// T1 for kWidth elements of a model; base holds the base's, already read.
template <class F>
__device__ __forceinline__ void task_vector(const TensorEntry& tensor, const ModelEntry& model,
                                            const F (&base)[kWidth], std::int64_t i, int count,
                                            F (&delta)[kWidth]) {
  load<F>(model.data, model.dtype, model.aligned != 0, i, count, delta);
  if (tensor.base == nullptr) return;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) delta[j] = delta[j] - base[j];
}

template <class F>
__device__ __forceinline__ void load_base(const TensorEntry& tensor, std::int64_t i, int count,
                                          F (&base)[kWidth]) {
  if (tensor.base != nullptr) {
    load<F>(tensor.base, tensor.base_dtype, tensor.base_aligned != 0, i, count, base);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) base[j] = 0;
  }
}

// The tensor that a tile (or, with Begin = chunk_begin, a chunk) belongs to.
template <std::int64_t TensorEntry::* Begin>
__device__ __forceinline__ int find_tensor(const Batch& batch, std::int64_t tile) {
  int low = 0, high = batch.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.tensor[middle].*Begin <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ int row_of(const Batch& batch, int tensor) {
  return batch.rows == 1 ? 0 : tensor;
}

// The value that a limit's key stands for, as a double; a limit that keeps none is NaN (T3).
template <class F>
__device__ __forceinline__ double threshold_value(std::uint64_t key) {
  if (key == kKeepNone) return bit_cast<double>(std::uint64_t(0x7ff8000000000000ull));
  return static_cast<double>(bit_cast<F>(static_cast<Key<F>>(key)));
}

}  // namespace pymerge::cuda
