// fast.cuh for one element type, so that the types compile side by side.

#include "cuda/ties/fast.cuh"

namespace pymerge::cuda {

void launch_fast_f32(const Batch& batch, int processors, Pass pass, cudaStream_t stream) {
  fast_models<float>(batch, processors, pass, stream);
}

}  // namespace pymerge::cuda
