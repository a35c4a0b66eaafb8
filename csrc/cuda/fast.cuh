// The common case at the speed of memory: 1 to 8 models, one dtype for models, base and output, every address a multiple of
// 16, limits from magnitudes or none, no rescaling, election by sum or none, any merge but max. 16 bytes a load, all of a
// step's loads before their first use, K unrolled. What is rare (NaN and infinity, candidates of a speculation, the last
// few elements) is left to one_element, from the inputs again.
//
// Moves (K + 1) reads and one write an element. Counts go to registers, to shared memory when the tensor changes, from there
// with one atomic a block.
#pragma once

#include <algorithm>

#include "element.cuh"
#include "kernels.h"

namespace pymerge::cuda {

// How an element type lies in 16 bytes.
template <class T>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int width = 4;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return bit_cast<float>(word[j]);
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = bit_cast<std::uint32_t>(x[j]);
  }
};

template <>
struct Packed<BFloat16> {
  static constexpr int width = 8;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return bit_cast<float>(j % 2 ? word[j / 2] & 0xffff0000u : word[j / 2] << 16);
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if defined(__CUDA_ARCH__)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[j]) : "f"(x[2 * j + 1]), "f"(x[2 * j]));
#else
      word[j] = to_bfloat16(x[2 * j]).bits |
                static_cast<std::uint32_t>(to_bfloat16(x[2 * j + 1]).bits) << 16;
#endif
    }
  }
};

template <>
struct Packed<Half> {
  static constexpr int width = 8;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return half_to_float(static_cast<std::uint16_t>(word[j / 2] >> (16 * (j % 2))));
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#if defined(__CUDA_ARCH__)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word[j]) : "f"(x[2 * j + 1]), "f"(x[2 * j]));
#else
      word[j] = to_half(x[2 * j]).bits | static_cast<std::uint32_t>(to_half(x[2 * j + 1]).bits)
                                             << 16;
#endif
    }
  }
};

template <class T>
__device__ __forceinline__ void read16(const T* data, std::uint32_t (&word)[4]) {
  const uint4 four = read_input<uint4>(data);
  word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
}

// What the fast loop needs of a model. Keys as floats: they compare alike, and a key over infinity's is a NaN, which
// nothing reaches.
struct FastModel {
  const void* data;
  float lower, from, cut;  // kept from `lower` on; a candidate from `from` to `cut`
  float weight, vote;
  float
      share;  // of the denominator: every merge is num / den, den a sum of weights, ones or nothing, 0 becoming 1 (T5)
};

// A block's view of the tensor that it works on, in shared memory.
struct Current {
  TensorEntry tensor;
  const ModelEntry* models;
  const Limit* limits;
  int zero_sign;
  bool wanted;
  unsigned others[4];  // conflicts, positive, negative, sensitive
  BlockCounts block;
  Bracket brackets[kSpeculateModels];
  FastModel model[8];
  float divisor;  // of weighted_mean without an election
  Recorder recorder;
};

// Everything about one element that the fast loop has left out: with `whole` its output and counts, and its candidates.
template <Pass P>
__device__ __noinline__ void careful(const Batch& batch, Current& now, std::int64_t i, bool whole) {
  const int K = batch.models;
  if (whole) {
    const OneElement one = one_element(batch, now.tensor, now.models, now.limits, now.zero_sign, i);
    store_element<float>(now.tensor.out, now.tensor.out_dtype, i, one.value);
    for (int k = 0; k < K; ++k) {
      if (one.kept >> k & 1u) atomicAdd(&now.block.kept[k], 1u);
      if (one.odd >> k & 1u) atomicAdd(&now.block.non_finite[k], 1u);
    }
    if (one.conflict) atomicAdd(&now.others[0], 1u);
    if (one.outcome > 0) atomicAdd(&now.others[1], 1u);
    if (one.outcome < 0) atomicAdd(&now.others[2], 1u);
    if (one.outcome == 0 && one.anyone) atomicAdd(&now.others[3], 1u);
  }
  if (P == Pass::kGuess) {
    const float base = one_base(now.tensor, i);
    for (int k = 0; k < K; ++k) {
      const std::uint32_t key = magnitude_key(one_delta(now.tensor, now.models[k], base, i));
      const std::uint32_t offset = key - now.brackets[k].from;
      if (offset < now.brackets[k].width)
        push(now.recorder, k, offset, static_cast<unsigned>(i) % kTile);
      if (whole && key >= now.brackets[k].cut) atomicAdd(&now.block.above[k], 1u);
    }
  }
}

template <Pass P>
__device__ __forceinline__ void fast_model(const Batch& batch, Current& now, int t, int k) {
  const std::int64_t own = static_cast<std::int64_t>(t) * batch.models + k;
  const ModelEntry& entry = batch.model[own];
  FastModel& model = now.model[k];
  const Limit& limit = P == Pass::kGuess ? batch.estimate[own] : batch.limit[own];
  model.data = entry.data;
  model.lower = bit_cast<float>(static_cast<std::uint32_t>(limit.lower));
  model.from = model.cut = 0;
  model.weight = static_cast<float>(entry.weight);
  model.vote = static_cast<float>(entry.elect);
  model.share = batch.merge == Merge::kWeightedMean ? model.weight
                : batch.merge == Merge::kMean       ? 1.0f
                                                    : 0.0f;
  if (P == Pass::kGuess) {
    const Bracket bracket = now.brackets[k] = bracket_of(batch.guess[own]);
    model.cut = bit_cast<float>(bracket.cut);
    model.from = bracket.width ? bit_cast<float>(bracket.from) : model.cut;
  }
  if (k == 0) {
    const float total = static_cast<float>(batch.tensor[t].every_weight);
    now.divisor = batch.merge != Merge::kWeightedMean ? 1.0f
                  : magnitude_of(total) < 1e-8f       ? 1.0f
                                                      : total;
  }
}

// P is kFirst or kGuess, as in apply.cu; Vote: an election by sum, else none. Persistent grid over the tiles.
template <int K, class T, Pass P, bool Vote>
__global__ void __launch_bounds__(kThreads, fast_blocks(K, sizeof(T)))
    fast(const __grid_constant__ Batch batch) {
  constexpr int V = Packed<T>::width;
  constexpr bool Guessing = P == Pass::kGuess;
  // A thread's counts are kept in 16 bits; after so many tiles they are handed over.
  constexpr int kTilesPerHandover = 32768 / (kTile / kThreads);
  __shared__ Current now;
  const int thread = static_cast<int>(threadIdx.x);
  clear(now.block);
  if (Guessing) clear(now.recorder);
  if (thread < 4) now.others[thread] = 0;
  __syncthreads();

  unsigned count[K] = {};     // kept, and from the cut on in the upper half
  unsigned pair[2] = {0, 0};  // conflicts and sensitive; positive and negative
  int current = -1, handover = 0;
  bool wanted = false;

  const auto hand_over = [&]() {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned kept = warp_sum(count[k] & 0xffffu),
                     above = Guessing ? warp_sum(count[k] >> 16) : 0;
      if (thread % 32 == 0) {
        if (kept) atomicAdd(&now.block.kept[k], kept);
        if (above) atomicAdd(&now.block.above[k], above);
      }
      count[k] = 0;
    }
    const unsigned sums[4] = {warp_sum(pair[0] & 0xffffu), warp_sum(pair[1] & 0xffffu),
                              warp_sum(pair[1] >> 16), warp_sum(pair[0] >> 16)};
    if (thread % 32 == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (sums[j]) atomicAdd(&now.others[j], sums[j]);
      }
    }
    pair[0] = pair[1] = 0;
    handover = 0;
  };
  const auto finish = [&](int t) {  // a tensor's counts, to its own
    hand_over();
    __syncthreads();
    ThreadCounts sums;
    if (thread == 0) {
      sums.conflicts = now.others[0], sums.positive = now.others[1];
      sums.negative = now.others[2], sums.sensitive = now.others[3];
    }
    flush(batch, t, now.block, sums);
    __syncthreads();
    if (thread < 4) now.others[thread] = 0;
  };

  for (std::int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int t = find_tensor<&TensorEntry::tile_begin>(batch, tile);
    if (t != current) {
      if (current >= 0) finish(current);
      __syncthreads();
      if (thread == 0) {  // one reads for all: another block may change `missed` meanwhile
        now.tensor = batch.tensor[t];
        now.models = batch.model + static_cast<std::int64_t>(t) * K;
        now.limits = (Guessing ? batch.estimate : batch.limit) + static_cast<std::int64_t>(t) * K;
        now.zero_sign = now.tensor.zero_sign < 0 ? -1 : 1;
        now.wanted =
            Guessing ? !was_missed(batch, t) : batch.guess == nullptr || was_missed(batch, t);
      }
      if (thread < K) fast_model<P>(batch, now, t, thread);
      __syncthreads();
      wanted = now.wanted;
      current = t;
    }
    if (!wanted) continue;
    // Read anew for each tile, so that nothing of it is held while `careful` runs.
    float lower[K], from[K], cut[K], weight[K], vote[K], share[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const FastModel& model = now.model[k];
      lower[k] = model.lower, from[k] = model.from, cut[k] = model.cut;
      weight[k] = model.weight, vote[k] = model.vote, share[k] = model.share;
    }
    const float scaling = static_cast<float>(now.tensor.scaling), divisor = now.divisor;
    const bool upwards = now.zero_sign > 0, by_count = batch.merge == Merge::kMean;
    unsigned odd = 0,
             candidates =
                 0;  // this thread's elements of the tile that are left to `careful`, one bit each
    const std::int64_t start = (tile - now.tensor.tile_begin) * kTile;
    const int length =
        static_cast<int>(min(now.tensor.n - start, static_cast<std::int64_t>(kTile)));
    const T* base_data = static_cast<const T*>(now.tensor.base);
    T* out_data = static_cast<T*>(now.tensor.out);
    const bool has_base = base_data != nullptr;
#pragma unroll 1
    for (int step = 0; step < kTile / (V * kThreads); ++step) {
      const int place = V * (step * kThreads + thread);
      if (place + V > length) {  // the tensor's last few, or beyond
        if (place < length) odd |= ((1u << (length - place)) - 1u) << (step * V);
        continue;
      }
      const std::int64_t i = start + place;
      // Without a base, -0 takes its place: x - (-0) is x (but for the sign of a zero, which decides nothing without
      // an infinity or a division by it), and -0 + y is y.
      std::uint32_t base[4], model[K][4];
      if (has_base) read16(base_data + i, base);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        // Volatile: the address is read from shared memory each time, which costs less than two registers a model.
        const void* const volatile* data = &now.model[k].data;
        read16(static_cast<const T*>(*data) + i, model[k]);
      }
      float result[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float b = has_base ? Packed<T>::get(base, j) : -0.0f;
        float delta[K];
        bool finite = true;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          delta[k] = Packed<T>::get(model[k], j) - b;  // T1
          finite = finite && fabsf(delta[k]) < HUGE_VALF;
        }
        float sum = 0;
        bool kept[K], inside = false, up = false, down = false;
        float value[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {  // T3, T4
          const float size = fabsf(delta[k]);
          kept[k] = size >= lower[k];
          const float product = delta[k] * vote[k];
          value[k] = kept[k] ? product : 0.0f;
          if (Vote) {
            sum = sum + value[k];
          } else {
            up = up || value[k] > 0;
            down = down || value[k] < 0;
          }
          if (Guessing) inside = inside || (size >= from[k] && !(size >= cut[k]));
          if (finite && kept[k]) ++count[k];
          if (Guessing && finite && size >= cut[k]) count[k] += 0x10000u;
        }
        const bool plus = sum > 0, minus = sum < 0;
        const bool negative = upwards ? minus : !plus;
        float total = 0, by = 0;
        bool opposed = false;
#pragma unroll
        for (int k = 0; k < K; ++k) {  // T5
          bool agreeing = kept[k];
          if (Vote) {
            const float turned = negative ? -value[k] : value[k];
            agreeing = turned > 0;
            opposed = opposed || turned < 0;
          }
          const float product = delta[k] * weight[k];
          if (agreeing) total = total + product;
          // Without a vote only kMean looks at `by`, and its shares are ones: K registers less.
          if (Vote ? agreeing : agreeing && delta[k] != 0) by = by + (Vote ? share[k] : 1.0f);
        }
        if (!Vote && !by_count) by = divisor;
        const float merged = total / (by == 0 ? 1.0f : by);
        result[j] = b + merged * scaling;  // T6
        if (finite) {
          // With a vote: where S is not 0 somebody voted for its sign, and S = 0 with votes takes both signs; so a vote
          // against the elected sign is a conflict.
          if (Vote ? opposed : up && down) ++pair[0];
          if (Vote) {
            if (!plus && !minus && opposed) pair[0] += 0x10000u;
            if (plus) ++pair[1];
            if (minus) pair[1] += 0x10000u;
          }
        }
        odd |= (finite ? 0u : 1u) << (step * V + j);
        candidates |= (Guessing && inside ? 1u : 0u) << (step * V + j);
      }
      std::uint32_t packed[4];
      Packed<T>::put(packed, result);
      write_output(out_data + i, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    }
    for (unsigned left = odd | candidates; left != 0; left &= left - 1) {
      const int bit = __ffs(left) - 1;
      const int place = V * (bit / V * kThreads + thread) + bit % V;
      careful<P>(batch, now, start + place, (odd >> bit & 1u) != 0);
    }
    if (++handover == kTilesPerHandover) hand_over();
    if (Guessing && !flush(batch, t, tile, now.recorder)) wanted = false;
  }
  if (current >= 0) finish(current);
}

template <int K, class T>
void fast_pass(const Batch& batch, int processors, Pass pass, cudaStream_t stream) {
  const std::int64_t most = static_cast<std::int64_t>(processors) * fast_blocks(K, sizeof(T));
  const dim3 grid(static_cast<unsigned>(std::min(batch.tiles, most)));
  const auto kernel = pass == Pass::kGuess          ? &fast<K, T, Pass::kGuess, true>
                      : batch.elect == Elect::kNone ? &fast<K, T, Pass::kFirst, false>
                                                    : &fast<K, T, Pass::kFirst, true>;
  PYMERGE_LAUNCH(kernel, grid, stream, batch);
}

template <class T>
void fast_models(const Batch& batch, int processors, Pass pass, cudaStream_t stream) {
  switch (batch.models) {
    case 1:
      return fast_pass<1, T>(batch, processors, pass, stream);
    case 2:
      return fast_pass<2, T>(batch, processors, pass, stream);
    case 3:
      return fast_pass<3, T>(batch, processors, pass, stream);
    case 4:
      return fast_pass<4, T>(batch, processors, pass, stream);
    case 5:
      return fast_pass<5, T>(batch, processors, pass, stream);
    case 6:
      return fast_pass<6, T>(batch, processors, pass, stream);
    case 7:
      return fast_pass<7, T>(batch, processors, pass, stream);
    default:
      return fast_pass<8, T>(batch, processors, pass, stream);
  }
}

}  // namespace pymerge::cuda
