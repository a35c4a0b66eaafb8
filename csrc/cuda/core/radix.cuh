// Radix selection, the parts that whole-grid and one-block kernels share.
#pragma once

#include "common/key.h"
#include "cuda/core/device.cuh"

namespace pymerge::cuda {

// Levels from the top bit down. The sign bit is clear, so 31 bits (63 for double) are looked at.
template <class F>
struct Radix;
template <>
struct Radix<float> {
  static constexpr int levels = 3;
  __host__ __device__ static constexpr int shift(int level) {
    return level == 0 ? 20 : level == 1 ? 10 : 0;
  }
  __host__ __device__ static constexpr int bits(int level) { return level == 0 ? 11 : 10; }
};
template <>
struct Radix<double> {
  static constexpr int levels = 6;
  __host__ __device__ static constexpr int shift(int level) {
    return level < 3 ? 52 - 11 * level : 20 - 10 * (level - 3);
  }
  __host__ __device__ static constexpr int bits(int level) { return level < 3 ? 11 : 10; }
};

// The bin of a key at a level, or -1 where the key is 0 or has another prefix. Zeros are never
// counted: a rank that the other keys do not reach selects 0.
template <class F>
__device__ __forceinline__ int bin_of(Key<F> key, std::uint64_t prefix, int level) {
  if (key == 0) return -1;
  const int shift = Radix<F>::shift(level), bits = Radix<F>::bits(level);
  const std::uint64_t wide = key;
  if (level > 0 && (wide >> (shift + bits)) != (prefix >> (shift + bits))) return -1;
  return static_cast<int>((wide >> shift) & ((1u << bits) - 1u));
}

struct Picked {
  std::uint64_t above;  // counts in the bins over the one found
  int bin;              // -1: the rank is beyond all counts
};

// Which bin, from the top, holds the rank-th count (rank from 1). All threads of the block call it
// and get the answer.
template <class Counter>
__device__ Picked block_pick(const Counter* bins, std::uint64_t rank) {
  __shared__ std::uint64_t sums[2][kThreads];
  __shared__ Picked picked;
  constexpr int each = kBins / kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  const int top = kBins - 1 - thread * each;
  std::uint64_t own = 0;
  for (int j = 0; j < each; ++j) own += bins[top - j];
  sums[0][thread] = own;
  if (thread == 0) picked = Picked{0, -1};
  __syncthreads();
  int from = 0;
  for (int step = 1; step < kThreads; step *= 2) {
    sums[1 - from][thread] = sums[from][thread] + (thread >= step ? sums[from][thread - step] : 0);
    from = 1 - from;
    __syncthreads();
  }
  const std::uint64_t through = sums[from][thread];
  std::uint64_t above = through - own;
  if (above < rank && rank <= through) {
    int bin = top;
    while (above + bins[bin] < rank) above += bins[bin--];
    picked = Picked{above, bin};
  }
  __syncthreads();
  const Picked result = picked;
  __syncthreads();
  return result;
}

// A selector after a level; true when the search is over.
template <class F>
__device__ __forceinline__ bool advance(std::uint64_t& prefix, std::uint64_t& rank,
                                        const Picked& picked, int level) {
  if (picked.bin < 0) {  // the rank lies among the zeros
    prefix = 0;
    return true;
  }
  prefix |= static_cast<std::uint64_t>(picked.bin) << Radix<F>::shift(level);
  rank -= picked.above;
  return level == Radix<F>::levels - 1;
}

}  // namespace pymerge::cuda
