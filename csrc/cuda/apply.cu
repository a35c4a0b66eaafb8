// Outputs and counts with all limits known (T3 to T6): reads K + 1 inputs, writes the output. Any
// K, any mix of dtypes, any alignment. With `majority` a second launch makes the outputs again
// where the zero sign turns out to be -; it returns at once for every other tensor.

#include <algorithm>

#include "evaluate.cuh"
#include "kernels.h"

namespace pymerge::cuda {
namespace {

// Persistent grid over the tiles. Counting: the first pass; otherwise the second one of T4
// `majority`.
template <class F, bool Counting>
__global__ void __launch_bounds__(kThreads, 2) apply(const Batch batch) {
  __shared__ BlockCounts block;
  ThreadCounts counts;
  clear(block);
  __syncthreads();
  int current = -1;
  bool wanted = false;
  for (std::int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int t = find_tensor<&TensorEntry::tile_begin>(batch, tile);
    const TensorEntry& tensor = batch.tensor[t];
    if (t != current) {
      if (Counting && current >= 0) {
        __syncthreads();
        flush(batch, current, block, counts);
        __syncthreads();
      }
      current = t;
      wanted = Counting || majority_is_minus(batch, t);
    }
    if (!wanted) continue;
    const ModelEntry* models = batch.model + static_cast<std::int64_t>(t) * batch.models;
    const Limit* limits = batch.limit + static_cast<std::int64_t>(row_of(batch, t)) * batch.models;
    const int zero_sign = !Counting ? -1 : tensor.zero_sign < 0 ? -1 : 1;
    const std::int64_t start = (tile - tensor.tile_begin) * kTile,
                       stop = min(tensor.n, start + kTile);
    for (std::int64_t step = start; step < stop; step += 4 * kThreads) {
      const std::int64_t i = step + 4 * static_cast<int>(threadIdx.x);
      const int count = available(i, stop);
      F result[4];
      evaluate<F, Counting>(batch, tensor, models, limits, zero_sign, i, count, result, &block,
                            counts);
      store<F, 4>(tensor.out, tensor.out_dtype, tensor.out_aligned != 0, i, count, result);
    }
  }
  if (Counting && current >= 0) {
    __syncthreads();
    flush(batch, current, block, counts);
  }
}

template <class F>
void apply_in(const Batch& batch, int processors, bool majority, cudaStream_t stream) {
  const std::int64_t most = static_cast<std::int64_t>(processors) * kBlocksPerProcessor;
  const dim3 grid(static_cast<unsigned>(std::min(batch.tiles, most)));
  const auto first = &apply<F, true>;
  PYMERGE_LAUNCH(first, grid, stream, batch);
  if (!majority) return;
  const auto second = &apply<F, false>;
  PYMERGE_LAUNCH(second, grid, stream, batch);
}

}  // namespace

void launch_apply(const Batch& batch, bool wide, int processors, bool majority,
                  cudaStream_t stream) {
  if (wide)
    apply_in<double>(batch, processors, majority, stream);
  else
    apply_in<float>(batch, processors, majority, stream);
}

}  // namespace pymerge::cuda
