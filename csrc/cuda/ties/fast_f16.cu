// fast.cuh for one element type, so that the types compile side by side.

#include "cuda/ties/fast.cuh"

namespace pymerge::cuda {

void launch_fast_f16(const Batch& batch, int processors, Pass pass, cudaStream_t stream) {
  fast_models<Half>(batch, processors, pass, stream);
}

}  // namespace pymerge::cuda
