// Tensors of at most kSmall elements: one block takes one through all of it (thresholds, norms,
// outputs, majority), so that any number of norms and biases costs one launch. The inputs are read
// a few times, from cache after the first.

#include "cuda/core/radix.cuh"
#include "cuda/ties/evaluate.cuh"
#include "cuda/ties/kernels.h"
#include "cuda/ties/norms.cuh"

namespace pymerge::cuda {
namespace {

template <class F>
__device__ void find_limits(const Batch& batch, const TensorEntry& tensor, int t, unsigned* bins) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int s = 0; s < batch.selectors; ++s) {
    const Selector& selector = batch.selector[static_cast<std::int64_t>(t) * batch.selectors + s];
    if (!selector.active) continue;
    const int k = s % batch.models;
    const ModelEntry& model = batch.model[static_cast<std::int64_t>(t) * batch.models + k];
    std::uint64_t prefix = 0, rank = selector.rank;
    bool found = false;
    for (int level = 0; level < Radix<F>::levels && !found; ++level) {
      for (int j = thread; j < kBins; j += kThreads) bins[j] = 0;
      __syncthreads();
      for (std::int64_t i = kWidth * thread; i < tensor.n; i += kWidth * kThreads) {
        const int count = available(i, tensor.n);
        F base[kWidth], delta[kWidth];
        load_base<F>(tensor, i, count, base);
        task_vector<F>(tensor, model, base, i, count, delta);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const int bin = j < count ? bin_of<F>(magnitude_key(delta[j]), prefix, level) : -1;
          if (bin >= 0) atomicAdd(&bins[bin], 1u);
        }
      }
      __syncthreads();
      found = advance<F>(prefix, rank, block_pick(bins, rank), level);
    }
    if (thread == 0) {
      Limit& limit = batch.limit[static_cast<std::int64_t>(t) * batch.models + k];
      (s < batch.models ? limit.lower : limit.upper) = prefix;
    }
  }
  __syncthreads();
}

template <class F>
__device__ void find_factors(const Batch& batch, const TensorEntry& tensor, int t, Norm kind) {
  __shared__ std::uint64_t ready[kChunkGroups][2];
  const int thread = static_cast<int>(threadIdx.x), group = thread / kChunkThreads;
  const std::int64_t chunks = (tensor.n + kChunk - 1) / kChunk;
  for (int k = 0; k < batch.models; ++k) {
    Limit& limit = batch.limit[static_cast<std::int64_t>(t) * batch.models + k];
    const bool needed = limit.factor == 0;
    __syncthreads();
    if (!needed) continue;
    std::uint64_t total[2] = {0, 0};
    for (std::int64_t from = 0; from < chunks; from += kChunkGroups) {
      const std::int64_t chunk = from + group < chunks ? from + group : -1;
      std::uint64_t result[2];
      chunk_norm<F>(batch, tensor, batch.model[static_cast<std::int64_t>(t) * batch.models + k],
                    limit, k, kind, chunk, result);
      if (thread % kChunkThreads == 0) ready[group][0] = result[0], ready[group][1] = result[1];
      __syncthreads();
      for (int g = 0; g < kChunkGroups && from + g < chunks; ++g) {
        for (int which = 0; which < 2; ++which)
          total[which] = join(kind, total[which], ready[g][which]);
      }
      __syncthreads();
    }
    double factor = 0;  // every thread has the total
    if (!settles<F>(kind, total, chunks, &factor)) {
      factor = exact_factor<F>(batch, tensor,
                               batch.model[static_cast<std::int64_t>(t) * batch.models + k], limit,
                               k, kind);
    }
    if (thread == 0) limit.factor = factor;
  }
  __syncthreads();
}

template <class F>
__global__ void __launch_bounds__(kThreads, general_blocks(sizeof(F)))
    merge_small(const __grid_constant__ Batch batch, Norm norm) {
  __shared__ unsigned bins[kBins];
  __shared__ BlockCounts block;
  const int t = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const TensorEntry& tensor = batch.tensor[t];
  find_limits<F>(batch, tensor, t, bins);
  if (norm != Norm::kNone) find_factors<F>(batch, tensor, t, norm);
  clear(block);
  __syncthreads();
  ThreadCounts counts;
  const ModelEntry* models = batch.model + static_cast<std::int64_t>(t) * batch.models;
  const Limit* limits = batch.limit + static_cast<std::int64_t>(t) * batch.models;
  for (std::int64_t step = 0; step < tensor.n; step += kWidth * kThreads) {
    const std::int64_t i = step + kWidth * thread;
    const int count = available(i, tensor.n);
    F result[kWidth];
    evaluate<F, Pass::kFirst>(batch, tensor, models, limits, tensor.zero_sign < 0 ? -1 : 1, i,
                              count, result, &block, counts);
    store<F>(tensor.out, tensor.out_dtype, tensor.out_aligned != 0, i, count, result);
  }
  __syncthreads();
  flush(batch, t, block, counts);
  double* thresholds = reinterpret_cast<double*>(tensor.stats + 2 * batch.models);
  for (int k = thread; k < batch.models; k += kThreads)
    thresholds[k] = threshold_value<F>(limits[k].lower);
  if (batch.elect == Elect::kNone || tensor.zero_sign != 0) return;
  __threadfence();
  __syncthreads();
  if (!majority_is_minus(batch, t)) return;
  for (std::int64_t step = 0; step < tensor.n; step += kWidth * kThreads) {
    const std::int64_t i = step + kWidth * thread;
    const int count = available(i, tensor.n);
    F result[kWidth];
    evaluate<F, Pass::kAgain>(batch, tensor, models, limits, -1, i, count, result, nullptr, counts);
    store<F>(tensor.out, tensor.out_dtype, tensor.out_aligned != 0, i, count, result);
  }
}

}  // namespace

void launch_small(const Batch& batch, bool wide, Norm norm, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(batch.tensors));
  if (wide) {
    const auto kernel = &merge_small<double>;
    PYMERGE_LAUNCH(kernel, grid, stream, batch, norm);
  } else {
    const auto kernel = &merge_small<float>;
    PYMERGE_LAUNCH(kernel, grid, stream, batch, norm);
  }
}

}  // namespace pymerge::cuda
