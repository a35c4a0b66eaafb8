// Outputs and counts in one pass (T3 to T6): reads K + 1 inputs, writes the output. Any K, any mix
// of dtypes, any alignment. With `majority` a last launch makes the outputs again where the zero
// sign turns out to be -; it returns at once for every other tensor.

#include <algorithm>

#include "cuda/ties/evaluate.cuh"
#include "cuda/ties/kernels.h"

namespace pymerge::cuda {
namespace {

// Persistent grid over the tiles. With sampled thresholds in the batch, kSampled takes the tensors
// that are not marked as missed and kFirst, later, those that are.
template <class F, Pass P>
__global__ void __launch_bounds__(kThreads, general_blocks(sizeof(F)))
    apply(const __grid_constant__ Batch batch) {
  __shared__ BlockCounts block;
  __shared__ Recorder recorder;
  __shared__ Bracket brackets[kSampledModels];
  __shared__ bool wanted_here;
  ThreadCounts counts;
  const int K = batch.models, thread = static_cast<int>(threadIdx.x);
  if (P != Pass::kAgain) clear(block);
  if (P == Pass::kSampled) clear(recorder);
  __syncthreads();
  int current = -1;
  bool wanted = false;
  for (std::int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int t = find_tensor<&TensorEntry::tile_begin>(batch, tile);
    const TensorEntry& tensor = batch.tensor[t];
    if (t != current) {
      __syncthreads();
      if (P != Pass::kAgain && current >= 0) flush(batch, current, block, counts);
      if (P == Pass::kSampled && thread < K) {
        brackets[thread] = bracket_of(batch.sampled[static_cast<std::int64_t>(t) * K + thread]);
      }
      if (thread == 0) {  // one reads for all: another block may change it meanwhile
        wanted_here = P == Pass::kAgain     ? majority_is_minus(batch, t)
                      : P == Pass::kSampled ? !was_missed(batch, t)
                                            : batch.sampled == nullptr || was_missed(batch, t);
      }
      __syncthreads();
      current = t;
      wanted = wanted_here;
    }
    if (!wanted) continue;
    const ModelEntry* models = batch.model + static_cast<std::int64_t>(t) * K;
    const Limit* limits = (P == Pass::kSampled ? batch.estimate : batch.limit) +
                          static_cast<std::int64_t>(row_of(batch, t)) * K;
    const int zero_sign = P == Pass::kAgain || tensor.zero_sign < 0 ? -1 : 1;
    const std::int64_t start = (tile - tensor.tile_begin) * kTile,
                       stop = min(tensor.n, start + kTile);
    for (std::int64_t step = start; step < stop; step += kWidth * kThreads) {
      const std::int64_t i = step + kWidth * thread;
      const int count = available(i, stop);
      F result[kWidth];
      evaluate<F, P>(batch, tensor, models, limits, zero_sign, i, count, result, &block, counts,
                     brackets, &recorder);
      store<F>(tensor.out, tensor.out_dtype, tensor.out_aligned != 0, i, count, result);
    }
    if (P == Pass::kSampled && !flush(batch, t, tile, recorder)) wanted = false;
  }
  if (P != Pass::kAgain && current >= 0) {
    __syncthreads();
    flush(batch, current, block, counts);
  }
}

dim3 grid_of(const Batch& batch, int processors) {
  const std::int64_t most = static_cast<std::int64_t>(processors) * kBlocksPerProcessor;
  return dim3(static_cast<unsigned>(std::min(batch.tiles, most)));
}

}  // namespace

void launch_sampled_pass(const Batch& batch, int processors, cudaStream_t stream) {
  const auto kernel = &apply<float, Pass::kSampled>;
  PYMERGE_LAUNCH(kernel, grid_of(batch, processors), stream, batch);
}

void launch_apply(const Batch& batch, bool wide, int processors, cudaStream_t stream) {
  const auto kernel = wide ? &apply<double, Pass::kFirst> : &apply<float, Pass::kFirst>;
  PYMERGE_LAUNCH(kernel, grid_of(batch, processors), stream, batch);
}

void launch_again(const Batch& batch, bool wide, int processors, cudaStream_t stream) {
  const auto kernel = wide ? &apply<double, Pass::kAgain> : &apply<float, Pass::kAgain>;
  PYMERGE_LAUNCH(kernel, grid_of(batch, processors), stream, batch);
}

}  // namespace pymerge::cuda
