// T9 over whole tensors: one pass over the inputs, partial sums per chunk, then the chunks; where
// the sums' rounding could change the quotient's, a block sums the tensor exactly.

#include "cuda/ties/kernels.h"
#include "cuda/ties/norms.cuh"

namespace pymerge::cuda {
namespace {

// Grid: x over groups of chunks, y over models.
template <class F>
__global__ void __launch_bounds__(kThreads)
    norm_chunks(const __grid_constant__ Batch batch, Norm kind) {
  const int thread = static_cast<int>(threadIdx.x), k = static_cast<int>(blockIdx.y);
  const std::int64_t chunk =
      static_cast<std::int64_t>(blockIdx.x) * kChunkGroups + thread / kChunkThreads;
  const bool inside = chunk < batch.chunks;
  const int t = inside ? find_tensor<&TensorEntry::chunk_begin>(batch, chunk) : 0;
  const TensorEntry& tensor = batch.tensor[t];
  const Limit& limit = batch.limit[static_cast<std::int64_t>(row_of(batch, t)) * batch.models + k];
  std::uint64_t result[2];
  chunk_norm<F>(batch, tensor, batch.model[static_cast<std::int64_t>(t) * batch.models + k], limit,
                k, kind, inside ? chunk - tensor.chunk_begin : -1, result);
  if (inside && thread % kChunkThreads == 0) {
    for (int which = 0; which < 2; ++which) {
      batch.norm[(2 * static_cast<std::int64_t>(k) + which) * batch.chunks + chunk] =
          bit_cast<double>(result[which]);
    }
  }
}

// One block a tensor and model: adds its chunks. Blocks are few: registers for one on a
// multiprocessor at a time keep the exact sums from spilling.
template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    norm_factors(const __grid_constant__ Batch batch, Norm kind) {
  __shared__ double part[2][kThreads];
  const int t = static_cast<int>(blockIdx.x), k = static_cast<int>(blockIdx.y);
  const std::int64_t begin = batch.tensor[t].chunk_begin;
  const std::int64_t end = t + 1 < batch.tensors ? batch.tensor[t + 1].chunk_begin : batch.chunks;
  const int thread = static_cast<int>(threadIdx.x);
  std::uint64_t total[2] = {0, 0};
  for (std::int64_t from = begin; from < end; from += kThreads) {
    for (int which = 0; which < 2; ++which) {
      if (from + thread < end) {
        part[which][thread] =
            batch.norm[(2 * static_cast<std::int64_t>(k) + which) * batch.chunks + from + thread];
      }
    }
    __syncthreads();
    if (thread == 0) {
      const int many = static_cast<int>(min(end - from, static_cast<std::int64_t>(kThreads)));
      for (int j = 0; j < many; ++j) {
        for (int which = 0; which < 2; ++which) {
          total[which] = join(kind, total[which], bit_cast<std::uint64_t>(part[which][j]));
        }
      }
    }
    __syncthreads();
  }
  __shared__ bool open;
  Limit& limit = batch.limit[static_cast<std::int64_t>(row_of(batch, t)) * batch.models + k];
  double factor = 0;
  if (thread == 0) open = limit.factor == 0 && !settles<F>(kind, total, end - begin, &factor);
  __syncthreads();
  if (open) {
    factor = exact_factor<F>(batch, batch.tensor[t],
                             batch.model[static_cast<std::int64_t>(t) * batch.models + k], limit, k,
                             kind);
  }
  if (thread == 0 && limit.factor == 0) limit.factor = factor;
}

template <class F>
void norms(const Batch& batch, Norm kind, cudaStream_t stream) {
  const unsigned models = static_cast<unsigned>(batch.models);
  const auto chunks = &norm_chunks<F>;
  PYMERGE_LAUNCH(
      chunks, dim3(static_cast<unsigned>((batch.chunks + kChunkGroups - 1) / kChunkGroups), models),
      stream, batch, kind);
  const auto factors = &norm_factors<F>;
  PYMERGE_LAUNCH(factors, dim3(static_cast<unsigned>(batch.tensors), models), stream, batch, kind);
}

}  // namespace

void launch_norms(const Batch& batch, bool wide, Norm norm, cudaStream_t stream) {
  if (wide)
    norms<double>(batch, norm, stream);
  else
    norms<float>(batch, norm, stream);
}

}  // namespace pymerge::cuda
