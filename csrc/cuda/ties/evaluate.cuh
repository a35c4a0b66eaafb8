// The rule on kWidth elements at a time: any K up to 64, any mix of dtypes, every option. The
// models are read twice (the second time from cache), so that nothing is held per model.
#pragma once

#include "common/philox.h"
#include "cuda/ties/batch.cuh"
#include "cuda/ties/record.cuh"

namespace pymerge::cuda {

// A block's counts of one tensor. kept and non_finite are in shared memory, the others in each
// thread's registers.
struct BlockCounts {
  unsigned kept[kMaxModels];
  unsigned non_finite[kMaxModels];
  unsigned above[kSampledModels];  // keys from the brackets' cut on
};

struct ThreadCounts {
  unsigned conflicts = 0, positive = 0, negative = 0, sensitive = 0;
};

// T3 for kWidth elements of model k: one bit an element.
template <class F>
__device__ __forceinline__ unsigned keep_bits(const Batch& batch, const TensorEntry& tensor,
                                              const ModelEntry& model, const Band<F>& band, int k,
                                              std::int64_t i, int count, const F (&delta)[kWidth]) {
  unsigned bits = 0;
  if (batch.trim == Trim::kNone) {
    bits = (1u << kWidth) - 1u;
  } else if (batch.trim == Trim::kRandom) {
    // T8: a block is of four elements. A part's first is a multiple of 4, not of kWidth.
    const std::uint64_t four = static_cast<std::uint64_t>(tensor.first + i) / 4;
#pragma unroll 1
    for (int j = 0; j < kWidth; j += 4) {
      const PhiloxBlock words = philox(four + static_cast<std::uint64_t>(j / 4),
                                       static_cast<std::uint32_t>(k), tensor.key);
#pragma unroll
      for (int v = 0; v < 4; ++v) bits |= (words.word[v] < model.cutoff ? 1u : 0u) << (j + v);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) bits |= (band.keeps(delta[j]) ? 1u : 0u) << j;
  }
  return bits & ((1u << count) - 1u);
}

// What T3r divides or multiplies by.
template <class F>
__device__ __forceinline__ F rescale_by(const Batch& batch, const ModelEntry& model,
                                        const Limit& limit) {
  return static_cast<F>(batch.rescale == Rescale::kDivide ? model.divisor : limit.factor);
}

template <class F>
__device__ __forceinline__ Band<F> band_of(const Limit& limit) {
  return Band<F>{static_cast<Key<F>>(limit.lower), static_cast<Key<F>>(limit.upper)};
}

// Outputs of the `count` elements from i on, i a multiple of kWidth. Whole warps call it together
// (count may be 0). zero_sign is what T4 takes where S is zero. Where limits are estimates,
// `recorder` takes the candidates.
template <class F, Pass P>
__device__ __forceinline__ void evaluate(const Batch& batch, const TensorEntry& tensor,
                                         const ModelEntry* models, const Limit* limits,
                                         int zero_sign, std::int64_t i, int count,
                                         F (&result)[kWidth], BlockCounts* block,
                                         ThreadCounts& counts, const Bracket* brackets = nullptr,
                                         Recorder* recorder = nullptr) {
  constexpr bool Counting = P != Pass::kAgain;
  const int K = batch.models;
  const bool leader = threadIdx.x % 32 == 0;
  F base[kWidth];
  load_base<F>(tensor, i, count, base);
  Election<F> election[kWidth];
  std::uint64_t kept[kWidth] = {};  // bit k: model k keeps it
  for (int k = 0; k < K; ++k) {
    const ModelEntry& model = models[k];
    F delta[kWidth];
    task_vector<F>(tensor, model, base, i, count, delta);
    const unsigned bits =
        keep_bits<F>(batch, tensor, model, band_of<F>(limits[k]), k, i, count, delta);
    const F by = rescale_by<F>(batch, model, limits[k]), weight = static_cast<F>(model.elect);
    unsigned odd = 0, over = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      election[j].see(delta[j]);
      if (!is_finite(delta[j])) ++odd;
      if constexpr (P == Pass::kSampled) {
        const std::uint32_t key = magnitude_key(delta[j]);
        if (j < count) {
          over += key >= brackets[k].cut;
          const std::uint32_t offset = key - brackets[k].from;
          if (offset < brackets[k].width)
            push(*recorder, k, offset, static_cast<unsigned>(i + j) % kTile);
        }
      }
      if (bits >> j & 1u) {
        kept[j] |= std::uint64_t(1) << k;
        election[j].vote(rescaled(delta[j], batch.rescale, by), weight);
      }
    }
    if (Counting) {
      // At most 32 kWidth each, which takes 9 bits.
      static_assert(32 * kWidth < 1 << 10, "three counts in 10 bits each");
      const unsigned together =
          warp_sum(static_cast<unsigned>(__popc(bits)) | odd << 10 | over << 20);
      if (leader) {
        const unsigned kept_here = together & 0x3ffu, odd_here = together >> 10 & 0x3ffu;
        if (kept_here) atomicAdd(&block->kept[k], kept_here);
        if (odd_here) atomicAdd(&block->non_finite[k], odd_here);
        if (P == Pass::kSampled && together >> 20) atomicAdd(&block->above[k], together >> 20);
      }
    }
  }
  // All that is left of the election, one bit an element: eight of them would not fit beside the
  // merge.
  unsigned minus = 0, poisoned = 0;
  std::uint64_t anybody = 0;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const int outcome = election[j].outcome(batch.elect);
    minus |= ((outcome != 0 ? outcome : zero_sign) < 0 ? 1u : 0u) << j;  // T4
    poisoned |= (election[j].poisoned() ? 1u : 0u) << j;
    anybody |= kept[j];
    if (Counting) {
      counts.conflicts += election[j].conflict();
      if (batch.elect != Elect::kNone) {
        counts.positive += outcome > 0;
        counts.negative += outcome < 0;
        counts.sensitive += outcome == 0 && election[j].anyone();
      }
    }
  }
  Disjoint<F> merge[kWidth];
  for (int k = 0; k < K; ++k) {
    if ((anybody >> k & 1u) == 0) continue;
    const ModelEntry& model = models[k];
    F delta[kWidth];
    task_vector<F>(tensor, model, base, i, count, delta);
    const F by = rescale_by<F>(batch, model, limits[k]);
    const F vote = static_cast<F>(model.elect), weight = static_cast<F>(model.weight);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (kept[j] >> k & 1u) {
        const F trimmed = rescaled(delta[j], batch.rescale, by);
        if (agrees(batch.elect, minus >> j & 1u ? -1 : 1, vote * trimmed))
          merge[j].add(batch.merge, trimmed, weight);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const F merged = merge[j].merged(batch.merge, batch.elect, static_cast<F>(tensor.every_weight));
    result[j] = output(tensor.base != nullptr, base[j], static_cast<F>(tensor.scaling), merged,
                       (poisoned >> j & 1u) != 0);
  }
}

__device__ __forceinline__ void clear(BlockCounts& block) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kMaxModels) block.kept[thread] = block.non_finite[thread] = 0;
  if (thread < kSampledModels) block.above[thread] = 0;
}

// Adds a block's counts to the tensor's and clears them. All threads of the block call it between
// barriers.
__device__ __forceinline__ void flush(const Batch& batch, int t, BlockCounts& block,
                                      ThreadCounts& counts) {
  const int K = batch.models, thread = static_cast<int>(threadIdx.x);
  std::int64_t* stats = batch.tensor[t].stats;
  for (int k = thread; k < K; k += kThreads) {
    if (block.kept[k]) add(&stats[k], block.kept[k]);
    if (block.non_finite[k]) add(&stats[K + k], block.non_finite[k]);
    block.kept[k] = block.non_finite[k] = 0;
    if (k < kSampledModels && block.above[k]) {
      add(&batch.sampled[static_cast<std::int64_t>(t) * K + k].above, block.above[k]);
      block.above[k] = 0;
    }
  }
  const unsigned conflicts = warp_sum(counts.conflicts), positive = warp_sum(counts.positive);
  const unsigned negative = warp_sum(counts.negative), sensitive = warp_sum(counts.sensitive);
  if (thread % 32 == 0) {
    if (conflicts) add(&stats[3 * K], conflicts);
    if (positive) add(&stats[3 * K + 1], positive);
    if (negative) add(&stats[3 * K + 2], negative);
    if (sensitive) add(&batch.state[t].sensitive, sensitive);
  }
  counts = ThreadCounts();
}

// T4 `majority`, once all of a tensor is counted: whether the outputs, made with +1, are to be made
// again with -1.
__device__ __forceinline__ bool majority_is_minus(const Batch& batch, int t) {
  // Volatile: the counts were made by atomics, past this processor's own cache.
  const volatile std::int64_t* stats = batch.tensor[t].stats;
  const volatile std::uint64_t* sensitive = &batch.state[t].sensitive;
  const int K = batch.models;
  return batch.elect != Elect::kNone && batch.tensor[t].zero_sign == 0 && *sensitive > 0 &&
         stats[3 * K + 1] <= stats[3 * K + 2];
}

}  // namespace pymerge::cuda
