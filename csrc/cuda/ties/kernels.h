// The launchers, one a kernel. `wide`: the working precision is binary64. All return without
// waiting.
#pragma once

#include "cuda/core/runtime.h"
#include "cuda/ties/batch.cuh"
#include "cuda/ties/ties.h"

namespace pymerge::cuda {

// select.cu
void launch_radix(const Batch& batch, bool wide, int processors, cudaStream_t stream);
void launch_report(const Batch& batch, bool wide, double* out, cudaStream_t stream);

// norms.cu: T9 and T3r, into limit.factor.
void launch_norms(const Batch& batch, bool wide, Norm norm, cudaStream_t stream);

// sampled_threshold.cu: before the main pass, which takes the estimates as limits, and after it.
void launch_sample(const Batch& batch, int processors, cudaStream_t stream);
void launch_resolve(const Batch& batch, int processors, cudaStream_t stream);

// apply.cu: outputs and counts by estimated limits; by final ones; outputs again where the majority
// turns out to be -.
void launch_sampled_pass(const Batch& batch, int processors, cudaStream_t stream);
void launch_apply(const Batch& batch, bool wide, int processors, cudaStream_t stream);
void launch_again(const Batch& batch, bool wide, int processors, cudaStream_t stream);

// fast_*.cu: the same for what fast.cuh takes (see `fast_type` in ties.cu).
void launch_fast_f32(const Batch& batch, int processors, Pass pass, cudaStream_t stream);
void launch_fast_f16(const Batch& batch, int processors, Pass pass, cudaStream_t stream);
void launch_fast_bf16(const Batch& batch, int processors, Pass pass, cudaStream_t stream);

// small.cu: one block a tensor does everything.
void launch_small(const Batch& batch, bool wide, Norm norm, cudaStream_t stream);

}  // namespace pymerge::cuda
