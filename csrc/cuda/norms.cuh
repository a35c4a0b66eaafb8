// T9: norms in binary64, in the order that the spec fixes.
#pragma once

#include "evaluate.cuh"
#include "ties.h"

namespace pymerge::cuda {

constexpr int kLanes = 64;
constexpr std::int64_t kChunk = 16384;

// Sum (or, for linf, the largest magnitude's bits) over one chunk, before and after trimming. 64
// threads of the block, one a lane, work on it; `partial` is the group's shared memory. All threads
// of the block call it (chunk < 0: nothing to do) and thread 0 of the group gets the result.
template <class F>
__device__ void chunk_norm(const Batch& batch, const TensorEntry& tensor, const ModelEntry& model,
                           const Limit& limit, int k, Norm kind, std::int64_t chunk,
                           std::uint64_t (*partial)[kLanes], std::uint64_t (&result)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  double sum[2] = {0, 0};
  std::uint64_t largest[2] = {0, 0};
  if (chunk >= 0) {
    const Band<F> band = band_of<F>(limit);
    const std::int64_t stop = min(tensor.n, (chunk + 1) * kChunk);
    for (std::int64_t i = chunk * kChunk + lane; i < stop; i += kLanes) {
      F delta = load_element<F>(model.data, model.dtype, i);
      if (tensor.base != nullptr)
        delta = delta - load_element<F>(tensor.base, tensor.base_dtype, i);
      bool kept = true;
      if (batch.trim == Trim::kRandom) {
        const PhiloxBlock words = philox(static_cast<std::uint64_t>(tensor.first + i) / 4,
                                         static_cast<std::uint32_t>(k), tensor.key);
        const int which = static_cast<int>(i % 4);
        const std::uint32_t low = which & 1 ? words.word[1] : words.word[0];
        const std::uint32_t high = which & 1 ? words.word[3] : words.word[2];
        kept = (which & 2 ? high : low) < model.cutoff;
      } else if (batch.trim != Trim::kNone) {
        kept = band.keeps(delta);
      }
      const double size = static_cast<double>(delta < 0 ? -delta : delta);
      const std::uint64_t bits = bit_cast<std::uint64_t>(size) & ~(std::uint64_t(1) << 63);
      const double term = kind == Norm::kL2 ? size * size : size;
      sum[0] = sum[0] + term;
      largest[0] = bits > largest[0] ? bits : largest[0];
      if (kept) {
        sum[1] = sum[1] + term;
        largest[1] = bits > largest[1] ? bits : largest[1];
      }
    }
  }
  for (int which = 0; which < 2; ++which) {
    partial[which][lane] =
        kind == Norm::kLinf ? largest[which] : bit_cast<std::uint64_t>(sum[which]);
  }
  __syncthreads();
  for (int half = kLanes / 2; half > 0; half /= 2) {
    if (lane < half) {
      for (int which = 0; which < 2; ++which) {
        const std::uint64_t a = partial[which][lane], b = partial[which][lane + half];
        if (kind == Norm::kLinf)
          partial[which][lane] = a > b ? a : b;
        else
          partial[which][lane] = bit_cast<std::uint64_t>(bit_cast<double>(a) + bit_cast<double>(b));
      }
    }
    __syncthreads();
  }
  for (int which = 0; which < 2; ++which) result[which] = partial[which][0];
  __syncthreads();
}

// The running norm after one more chunk.
__device__ __forceinline__ std::uint64_t join(Norm kind, std::uint64_t total, std::uint64_t chunk) {
  if (kind == Norm::kLinf) return total > chunk ? total : chunk;
  return bit_cast<std::uint64_t>(bit_cast<double>(total) + bit_cast<double>(chunk));
}

// f_k of T3r. A model that keeps all, or none by its density, has a divisor of 1 and no factor: see
// host.
template <class F>
__device__ __forceinline__ double norm_factor(Norm kind, const std::uint64_t (&total)[2]) {
  double before = bit_cast<double>(total[0]), after = bit_cast<double>(total[1]);
  if (kind == Norm::kL2) before = sqrt(before), after = sqrt(after);
  if (!(before >= 1e-7 && after >= 1e-7)) return 1.0;
  return static_cast<double>(static_cast<F>(before / after));
}

}  // namespace pymerge::cuda
