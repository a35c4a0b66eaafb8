// What both ways of conjugate gradient on the device decide and sum up alike (docs/spec/mats.md,
// M6 to M9): cg.cu for layers of any size, cg_small.cu for those that one block of threads solves.
#pragma once

#include "cuda/core/device.cuh"
#include "cuda/core/tuning.h"
#include "cuda/mats/cg.h"

namespace pymerge::cuda {

constexpr int kFan = 16;  // kThreads sums in two steps of so many
static_assert(kFan * kFan == kThreads);

// The block's sums of N numbers a thread, in every thread; all threads take part, and what they
// wrote before is seen by all after it.
template <int N>
__device__ __forceinline__ void block_sum(double (&value)[N], double (*shared)[kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < N; ++k) shared[k][thread] = value[k];
  __syncthreads();
  if (thread < kFan) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      double sum = shared[k][thread];
      for (int j = 1; j < kFan; ++j) sum = sum + shared[k][thread + j * kFan];
      shared[k][thread] = sum;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    value[k] = shared[k][0];
    for (int j = 1; j < kFan; ++j) value[k] = value[k] + shared[k][j];
  }
  __syncthreads();
}

// M6, M8, M9: how far the step goes along p, 0 where the iteration changes nothing. curvature:
// <p, q>. pp, dp: <p, p> and <step, p>, read where the step is limited.
__device__ __forceinline__ double advance(CgState& state, double curvature, bool limits, double pp,
                                          double dp) {
  const double infinity = bit_cast<double>(std::uint64_t(0x7ff0000000000000ull));
  double alpha = state.rho / curvature;
  // M9: comparisons with NaN are false.
  const bool active = state.active != 0;
  const bool good =
      active && curvature > 0 && curvature < infinity && state.rho > 0 && alpha < infinity;
  bool over = false;
  if (limits) {  // M8
    const double square = state.limit2;
    const double ahead = state.dd + 2 * alpha * dp + alpha * alpha * pp;
    over = good && !(ahead <= square);
    const double left = square - state.dd, room = left < 0 ? 0 : left;
    if (over) alpha = (sqrt(dp * dp + pp * room) - dp) / pp;
  }
  if (!good) alpha = 0;
  state.gain = good ? alpha * state.rho - alpha * alpha * curvature / 2 : 0;
  state.decrease = state.decrease + state.gain;
  state.done = state.done + (good ? 1 : 0);
  state.active = good ? 1 : 0;
  if (over) state.limited = 1;
  if (active && !good) state.broke = 1;
  return alpha;
}

// M8: whether a layer that has taken its step goes on. rr, dd: the new <r, r> and <step, step>.
__device__ __forceinline__ void settle(CgState& state, double rr, double dd) {
  state.rr = rr;
  state.dd = dd;
  const bool good = state.active != 0, limited = state.limited != 0;
  const bool finished = state.gain <= state.tolerance * state.decrease || rr <= state.enough;
  if (good && finished && !limited) state.converged = 1;
  state.active = good && !finished && !limited ? 1 : 0;
}

// M6: how much of the last direction the next one keeps, 0 where the layer has stopped. following:
// the new <r, z>.
__device__ __forceinline__ double turn(CgState& state, double following) {
  if (state.active == 0) return 0;
  const double beta = following / state.rho;
  state.rho = following;
  return beta;
}

}  // namespace pymerge::cuda
