// T9: norms in binary64, and exactly where their rounding could change the quotient's.
#pragma once

#include "common/exact_sum.h"
#include "cuda/ties/evaluate.cuh"
#include "cuda/ties/ties.h"

namespace pymerge::cuda {

constexpr int kLanes = 64;
constexpr std::int64_t kChunk = 16384;
constexpr int kChunkThreads = kLanes / kWidth;          // that work on one chunk, kWidth lanes each
constexpr int kChunkGroups = kThreads / kChunkThreads;  // chunks that a block takes at a time
static_assert(32 % kChunkThreads == 0, "a chunk's threads exchange inside of their warp");

// A norm after one more term, or of two parts; as bits, whose order is that of magnitudes, with NaN
// above infinity.
__device__ __forceinline__ std::uint64_t join(Norm kind, std::uint64_t a, std::uint64_t b) {
  if (kind == Norm::kLinf) return a > b ? a : b;
  return bit_cast<std::uint64_t>(bit_cast<double>(a) + bit_cast<double>(b));
}

__device__ __forceinline__ std::uint64_t exchange(std::uint64_t value, int with) {
  const unsigned low = __shfl_xor_sync(0xffffffffu, static_cast<unsigned>(value), with);
  const unsigned high = __shfl_xor_sync(0xffffffffu, static_cast<unsigned>(value >> 32), with);
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// Sum (or, for linf, the largest magnitude's bits) over one chunk, before and after trimming, in
// all of the kChunkThreads threads that work on it. Whole warps call it (chunk < 0: nothing to do).
template <class F>
__device__ void chunk_norm(const Batch& batch, const TensorEntry& tensor, const ModelEntry& model,
                           const Limit& limit, int k, Norm kind, std::int64_t chunk,
                           std::uint64_t (&result)[2]) {
  const int group_thread = static_cast<int>(threadIdx.x) % kChunkThreads;
  std::uint64_t lane[2][kWidth] = {};
  if (chunk >= 0) {
    const Band<F> band = band_of<F>(limit);
    const std::int64_t stop = min(tensor.n, (chunk + 1) * kChunk);
    for (std::int64_t i = chunk * kChunk + group_thread * kWidth; i < stop; i += kLanes) {
      const int count = available(i, stop);
      F base[kWidth], delta[kWidth];
      load_base<F>(tensor, i, count, base);
      task_vector<F>(tensor, model, base, i, count,
                     delta);  // 0 from `count` on, which changes no norm
      const unsigned bits = keep_bits<F>(batch, tensor, model, band, k, i, count, delta);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const double size = static_cast<double>(delta[j] < 0 ? -delta[j] : delta[j]);
        const double term = kind == Norm::kL2 ? size * size : size;
        const std::uint64_t one = bit_cast<std::uint64_t>(term) & ~(std::uint64_t(1) << 63);
        lane[0][j] = join(kind, lane[0][j], one);
        if (bits >> j & 1u) lane[1][j] = join(kind, lane[1][j], one);
      }
    }
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int with = kChunkThreads / 2; with > 0; with /= 2) {  // lane j with j + 32, 16, 8
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        lane[which][j] = join(kind, lane[which][j], exchange(lane[which][j], with));
    }
#pragma unroll
    for (int half = kWidth / 2; half > 0; half /= 2) {  // and 4, 2, 1
#pragma unroll
      for (int j = 0; j < half; ++j)
        lane[which][j] = join(kind, lane[which][j], lane[which][j + half]);
    }
    result[which] = lane[which][0];
  }
}

// f_k of T9 from sums over `chunks` chunks; false where they do not settle it. A model that keeps
// all, or none by its density, has a divisor of 1 and no factor: see host.
template <class F>
__device__ __forceinline__ bool settles(Norm kind, const std::uint64_t (&total)[2],
                                        std::int64_t chunks, double* factor) {
  const double before = bit_cast<double>(total[0]), after = bit_cast<double>(total[1]);
  F result = F(1);
  if (kind == Norm::kLinf) {
    if (before >= exact::kLeastNorm && after >= exact::kLeastNorm)
      result = static_cast<F>(before / after);
  } else {
    // In binary64 sums that are rounded at each step rarely settle a quotient of that precision.
    if (sizeof(F) == 8) return false;
    const double additions = static_cast<double>(kChunk / kLanes + chunks + 16);
    if (!exact::settles(before, after, additions * 0x1p-53, kind == Norm::kL2, &result))
      return false;
  }
  *factor = static_cast<double>(result);
  return true;
}

// f_k of T9 from exact sums, by a whole block, in its thread 0.
template <class F>
__device__ __noinline__ double exact_factor(const Batch& batch, const TensorEntry& tensor,
                                            const ModelEntry& model, const Limit& limit, int k,
                                            Norm kind) {
  __shared__ exact::Sum sums[2];
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 2 * exact::kLimbs; i += kThreads)
    sums[i / exact::kLimbs].limbs[i % exact::kLimbs] = 0;
  if (thread < 2) sums[thread].infinite = sums[thread].nan = false;
  __syncthreads();
  const Band<F> band = band_of<F>(limit);
  for (std::int64_t i = kWidth * thread; i < tensor.n; i += kWidth * kThreads) {
    const int count = available(i, tensor.n);
    F base[kWidth], delta[kWidth];
    load_base<F>(tensor, i, count, base);
    task_vector<F>(tensor, model, base, i, count, delta);
    unsigned bits = keep_bits<F>(batch, tensor, model, band, k, i, count, delta);
#pragma unroll 1
    for (int j = 0; j < kWidth; ++j) {  // zeros from `count` on
      for (int which = 0; which < 2; ++which) {
        if (which == 1 && !(bits & 1u)) continue;
        exact::Sum& sum = sums[which];
        sum.add(static_cast<double>(delta[0]), kind == Norm::kL2,
                [&sum](int limb, std::uint64_t term) {
                  atomicAdd(reinterpret_cast<unsigned long long*>(&sum.limbs[limb]),
                            static_cast<unsigned long long>(term));
                });
      }
      // The next one into its place: an index that is known at run time alone would put them all
      // into memory.
      bits >>= 1;
#pragma unroll
      for (int v = 0; v + 1 < kWidth; ++v) delta[v] = delta[v + 1];
    }
  }
  __syncthreads();
  if (thread != 0) return 0;
  sums[0].carry();
  sums[1].carry();
  return static_cast<double>(exact::factor<F>(sums[0], sums[1], kind == Norm::kL2));
}

}  // namespace pymerge::cuda
