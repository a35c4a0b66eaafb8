// The exact r-th largest magnitude of each task vector (T3), by radix from the top bit down, for
// every tensor of a batch at once. Moves (K + 1) n elements a level (3 levels; 6 in binary64). A
// selector that is no longer active costs nothing: tiles whose selectors are all found are not
// read. No host synchronisation; integer counts, so any order of blocks gives the same result.

#include "cuda/core/radix.cuh"
#include "cuda/ties/kernels.h"

namespace pymerge::cuda {
namespace {

// Finds the bin of selector s's rank, descends into it, clears the histogram for the next level.
// One block.
template <class F>
__device__ void descend_one(const Batch& batch, int s, int level) {
  volatile Selector& selector = batch.selector[s];
  if (!selector.active) return;
  // Volatile: the counts were made by atomics, past this processor's own cache.
  volatile std::uint64_t* bins = batch.histogram + s * batch.histogram_words;
  std::uint64_t prefix = selector.prefix, rank = selector.rank;
  const Picked picked = block_pick<volatile std::uint64_t>(bins, rank);
  for (int j = static_cast<int>(threadIdx.x); j < kBins; j += kThreads) bins[j] = 0;
  if (threadIdx.x != 0) return;
  const bool found = advance<F>(prefix, rank, picked, level);
  selector.prefix = prefix;
  selector.rank = rank;
  if (found) {
    selector.active = 0;
    const int k = s % batch.selectors;
    Limit& limit = batch.limit[static_cast<std::int64_t>(s / batch.selectors) * batch.models +
                               k % batch.models];
    (k < batch.models ? limit.lower : limit.upper) = prefix;
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    descend(const __grid_constant__ Batch batch, int level) {
  descend_one<F>(batch, static_cast<int>(blockIdx.x), level);
}

// Grid: x over contiguous ranges of tiles, y over groups of kGroup selectors. With `descends` the
// block that finishes last also descends, which saves a launch where there are few selectors.
template <class F>
__global__ void __launch_bounds__(kThreads, histogram_blocks(sizeof(F)))
    histogram(const __grid_constant__ Batch batch, int level, std::int64_t tiles_per_block,
              bool descends) {
  __shared__ unsigned bins[kGroup][kBins];
  __shared__ std::uint64_t prefix[kGroup];
  __shared__ unsigned active[kGroup];
  const int first = static_cast<int>(blockIdx.y) * kGroup;
  const int group = min(kGroup, batch.selectors - first);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * tiles_per_block;
  const std::int64_t end = min(batch.tiles, begin + tiles_per_block);
  for (int j = thread; j < kGroup * kBins; j += kThreads) bins[j / kBins][j % kBins] = 0;
  int row = -1, t = 0;
  bool any = false;
  for (std::int64_t tile = begin; tile <= end; ++tile) {
    int next_row = -1;
    if (tile < end) {
      t = find_tensor<&TensorEntry::tile_begin>(batch, tile);
      next_row = row_of(batch, t);
    }
    if (next_row != row) {
      __syncthreads();
      if (row >= 0 && any) {  // hand over the finished row
        std::uint64_t* into =
            batch.histogram +
            (static_cast<std::int64_t>(row) * batch.selectors + first) * batch.histogram_words;
        for (int j = thread; j < group * kBins; j += kThreads) {
          const unsigned count = bins[j / kBins][j % kBins];
          if (count) add(&into[j / kBins * batch.histogram_words + j % kBins], count);
          bins[j / kBins][j % kBins] = 0;
        }
      }
      if (next_row < 0) break;
      if (thread < group) {
        const Selector& selector =
            batch.selector[static_cast<std::int64_t>(next_row) * batch.selectors + first + thread];
        prefix[thread] = selector.prefix;
        active[thread] = selector.active;
      }
      __syncthreads();
      row = next_row;
      any = false;
      for (int g = 0; g < group; ++g) any = any || active[g] != 0;
    }
    if (!any || tile == end) continue;
    const TensorEntry& tensor = batch.tensor[t];
    const std::int64_t start = (tile - tensor.tile_begin) * kTile;
    const std::int64_t stop = min(tensor.n, start + kTile);
    for (std::int64_t i = start + kWidth * thread; i < stop; i += kWidth * kThreads) {
      const int count = available(i, stop);
      F base[kWidth];
      load_base<F>(tensor, i, count, base);
      for (int g = 0; g < group; ++g) {
        if (!active[g]) continue;
        const int k = (first + g) % batch.models;
        F delta[kWidth];
        task_vector<F>(tensor, batch.model[static_cast<std::int64_t>(t) * batch.models + k], base,
                       i, count, delta);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const int bin = j < count ? bin_of<F>(magnitude_key(delta[j]), prefix[g], level) : -1;
          if (bin >= 0) atomicAdd(&bins[g][bin], 1u);
        }
      }
    }
  }
  if (!descends) return;
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (thread == 0) last = atomicAdd(&batch.ticket[level], 1u) == gridDim.x * gridDim.y - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int s = 0; s < batch.rows * batch.selectors; ++s) descend_one<F>(batch, s, level);
}

// Thresholds as doubles: to `out` where the tensors share them, else to each tensor's counts.
template <class F>
__global__ void __launch_bounds__(kThreads)
    report(const __grid_constant__ Batch batch, double* out) {
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= static_cast<std::int64_t>(batch.rows) * batch.models) return;
  const std::int64_t t = j / batch.models, k = j % batch.models;
  double* into = out ? out : reinterpret_cast<double*>(batch.tensor[t].stats + 2 * batch.models);
  into[k] = threshold_value<F>(batch.limit[j].lower);
  if (k == 0 && batch.sampled != nullptr && batch.tensor[t].sampled != 0) {
    batch.tensor[t].stats[3 * batch.models + 3] = batch.state[t].missed;
  }
}

template <class F>
void radix(const Batch& batch, int processors, cudaStream_t stream) {
  const std::int64_t most =
      static_cast<std::int64_t>(processors) * 6;  // 6 x 32 KB of shared memory a processor
  const std::int64_t per_block = (batch.tiles + most - 1) / most;
  const std::int64_t blocks = (batch.tiles + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((batch.selectors + kGroup - 1) / kGroup));
  const bool few = batch.rows * batch.selectors <= kFewSelectors;
  for (int level = 0; level < Radix<F>::levels; ++level) {
    const auto count = &histogram<F>;
    PYMERGE_LAUNCH(count, grid, stream, batch, level, per_block, few);
    if (few) continue;
    const auto pick = &descend<F>;
    PYMERGE_LAUNCH(pick, dim3(static_cast<unsigned>(batch.rows * batch.selectors)), stream, batch,
                   level);
  }
}

template <class F>
void report_in(const Batch& batch, double* out, cudaStream_t stream) {
  const std::int64_t all = static_cast<std::int64_t>(batch.rows) * batch.models;
  const auto kernel = &report<F>;
  PYMERGE_LAUNCH(kernel, dim3(static_cast<unsigned>((all + kThreads - 1) / kThreads)), stream,
                 batch, out);
}

}  // namespace

void launch_radix(const Batch& batch, bool wide, int processors, cudaStream_t stream) {
  if (wide)
    radix<double>(batch, processors, stream);
  else
    radix<float>(batch, processors, stream);
}

void launch_report(const Batch& batch, bool wide, double* out, cudaStream_t stream) {
  if (wide)
    report_in<double>(batch, out, stream);
  else
    report_in<float>(batch, out, stream);
}

}  // namespace pymerge::cuda
