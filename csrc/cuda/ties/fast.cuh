// The common case at the speed of memory: 1 to 8 models, one dtype for models, base and output,
// every address a multiple of 16, limits from magnitudes or none, no rescaling, election by sum or
// none, any merge but max. 16 bytes a load, all of a step's loads before their first use, K
// unrolled. What is rare (NaN and infinity, candidates in a bracket, the last few elements) is left
// to one_element, from the inputs again.
//
// Moves (K + 1) reads and one write an element. Counts go to registers, every few tiles to shared
// memory, from there with one atomic a block when the tensor changes. What limits it is the number
// of instructions: benchmarks/cuda_instructions.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/ties/element.cuh"
#include "cuda/ties/kernels.h"

namespace pymerge::cuda {

// How an element type lies in 16 bytes. What `put` makes of NaN is not N2's.
template <class T>
struct Packed;

template <>
struct Packed<float> {
  static constexpr int width = 4;
  static constexpr std::uint32_t minus_zero = 0x80000000u;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return bit_cast<float>(word[j]);
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = bit_cast<std::uint32_t>(x[j]);
  }
};

// Two elements of 16 bits in a word.
template <class T>
__device__ __forceinline__ void put_shorts(std::uint32_t (&word)[4], const float (&x)[8]) {
  constexpr DType kType = std::is_same_v<T, Half> ? DType::kFloat16 : DType::kBFloat16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    word[j] = to_short(kType, x[2 * j]) | static_cast<std::uint32_t>(to_short(kType, x[2 * j + 1]))
                                              << 16;
  }
}

template <>
struct Packed<BFloat16> {
  static constexpr int width = 8;
  static constexpr std::uint32_t minus_zero = 0x80008000u;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return bit_cast<float>(j % 2 ? word[j / 2] & 0xffff0000u : word[j / 2] << 16);
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[8]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
    for (int j = 0; j < 4; ++j)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[j]) : "f"(x[2 * j + 1]), "f"(x[2 * j]));
#else
    put_shorts<BFloat16>(word, x);  // before sm_80 no instruction makes two
#endif
  }
};

template <>
struct Packed<Half> {
  static constexpr int width = 8;
  static constexpr std::uint32_t minus_zero = 0x80008000u;
  static __device__ __forceinline__ float get(const std::uint32_t (&word)[4], int j) {
    return half_to_float(static_cast<std::uint16_t>(word[j / 2] >> (16 * (j % 2))));
  }
  static __device__ __forceinline__ void put(std::uint32_t (&word)[4], const float (&x)[8]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
    for (int j = 0; j < 4; ++j)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word[j]) : "f"(x[2 * j + 1]), "f"(x[2 * j]));
#else
    put_shorts<Half>(word, x);
#endif
  }
};

template <class T>
__device__ __forceinline__ void read16(const T* data, std::uint32_t (&word)[4]) {
  const uint4 four = read_input<uint4>(data);
  word[0] = four.x, word[1] = four.y, word[2] = four.z, word[3] = four.w;
}

constexpr std::uint32_t kLargestKey = 0x7f7fffffu;  // of what is finite
// Task vectors this times as large, and their sum, are to be finite: then the sum of eight is too.
constexpr float kRoom = 16;
// Totals below it may have subnormal sixths.
constexpr float kSafeTotal = 1e-30f;

// Two numbers that are read together.
struct alignas(8) Pair {
  float first, second;
};

// Read from shared memory each time, where holding it would take too many registers.
__device__ __forceinline__ Pair read_anew(const Pair& pair) {
  const std::uint64_t both = *reinterpret_cast<const volatile std::uint64_t*>(&pair);
  return Pair{bit_cast<float>(static_cast<std::uint32_t>(both)),
              bit_cast<float>(static_cast<std::uint32_t>(both >> 32))};
}

__device__ __forceinline__ float read_anew(const float& number) {
  return *static_cast<const volatile float*>(&number);
}

// What the fast loop needs of a model. Keys as floats: they compare alike, and a key over
// infinity's is a NaN, which nothing reaches.
struct FastModel {
  const void* data;
  Pair near;  // a candidate, or next to one, is within `second` of `first`
  // w_k, and its share of the denominator: every merge is num / den, den a sum of weights, ones or
  // nothing, 0 becoming 1 (T5).
  Pair product;
  float vote;
  float lower;     // kept from here on; at least the smallest number, since a zero changes nothing
  float cut;       // counted from here on, where the bracket has collapsed
  bool all;        // zeros are kept too
  bool collapsed;  // the bracket has no candidates
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
  Bracket brackets[kSampledModels];
  FastModel model[8];
  float divisor;  // of weighted_mean without an election
  Recorder recorder;
};

// What is to be done again about an element.
enum : unsigned { kValue = 1, kCounts = 2 };

// Everything about one element that the fast loop has left out: its output, its counts, its
// candidates.
template <Pass P>
__device__ __noinline__ void slow_path(const Batch& batch, Current& now, std::int64_t i,
                                       unsigned what) {
  const int K = batch.models;
  if (what & kValue) {
    const OneElement one = one_element(batch, now.tensor, now.models, now.limits, now.zero_sign, i);
    store_element<float>(now.tensor.out, now.tensor.out_dtype, i, one.value);
    if (what & kCounts) {
      for (int k = 0; k < K; ++k) {
        if (one.kept >> k & 1u) atomicAdd(&now.block.kept[k], 1u);
        if (one.odd >> k & 1u) atomicAdd(&now.block.non_finite[k], 1u);
      }
      if (one.conflict) atomicAdd(&now.others[0], 1u);
      if (one.outcome > 0) atomicAdd(&now.others[1], 1u);
      if (one.outcome < 0) atomicAdd(&now.others[2], 1u);
      if (one.outcome == 0 && one.anyone) atomicAdd(&now.others[3], 1u);
    }
  }
  if (P == Pass::kSampled) {
    const float base = one_base(now.tensor, i);
    for (int k = 0; k < K; ++k) {
      const std::uint32_t key = magnitude_key(one_delta(now.tensor, now.models[k], base, i));
      const std::uint32_t offset = key - now.brackets[k].from;
      const bool inside = offset < now.brackets[k].width;
      if (inside) push(now.recorder, k, offset, static_cast<unsigned>(i) % kTile);
      if (what & kCounts) {
        if (key >= now.brackets[k].cut) atomicAdd(&now.block.above[k], 1u);
      } else if (inside && key >= static_cast<std::uint32_t>(now.limits[k].lower)) {
        atomicAdd(&now.block.above[k], ~0u);  // less one: see `hand_over`
      }
    }
  }
}

template <Pass P>
__device__ __forceinline__ void fast_model(const Batch& batch, Current& now, int t, int k) {
  const std::int64_t own = static_cast<std::int64_t>(t) * batch.models + k;
  const ModelEntry& entry = batch.model[own];
  FastModel& model = now.model[k];
  const Limit& limit = P == Pass::kSampled ? batch.estimate[own] : batch.limit[own];
  const auto lower = static_cast<std::uint32_t>(limit.lower);
  model.data = entry.data;
  model.all = lower == 0;
  model.lower = bit_cast<float>(lower == 0 ? 1u : lower);
  model.vote = static_cast<float>(entry.elect);
  const float weight = static_cast<float>(entry.weight);
  model.product = {weight, batch.merge == Merge::kWeightedMean ? weight
                           : batch.merge == Merge::kMean       ? 1.0f
                                                               : 0.0f};
  if (P == Pass::kSampled) {
    const Bracket bracket = now.brackets[k] = bracket_of(batch.sampled[own]);
    model.cut = bit_cast<float>(bracket.cut);
    model.collapsed = bracket.width == 0;
    model.near = {0, -1};  // nothing is
    if (bracket.width) {
      // Differences round monotonously, so that all of the bracket is as near as its ends.
      const float from = bit_cast<float>(bracket.from),
                  to = bit_cast<float>(min(bracket.from + bracket.width, kLargestKey));
      const float middle = from / 2 + to / 2;
      model.near = {middle, fmaxf(middle - from, to - middle)};
    }
  }
  if (k == 0) {
    const float total = static_cast<float>(batch.tensor[t].every_weight);
    now.divisor = batch.merge != Merge::kWeightedMean ? 1.0f
                  : magnitude_of(total) < 1e-8f       ? 1.0f
                                                      : total;
  }
}

__device__ __forceinline__ float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// 1 / n for n = 1 to 8, at the place that the upper bits of n say; the lower 21 are 0.
constexpr int kReciprocals = 0x209;
__device__ __forceinline__ unsigned reciprocal_place(float count) {  // in bytes
  return bit_cast<std::uint32_t>(count) >> 21 - 2;
}

__device__ __forceinline__ float reciprocal_at(int place) {
  const float count = bit_cast<float>(static_cast<std::uint32_t>(place) << 21);
  return count >= 1 ? 1 / count : 0;
}

// total / count for a whole count of up to 8, with the reciprocal correctly rounded: the quotient
// is within an ulp, the remainder exact, and the corrected quotient correctly rounded where no
// exact one lies midway between two numbers. That takes a subnormal quotient and a count of 6,
// which the caller sees to. 0 / 0 is 0.
__device__ __forceinline__ float divide_by_count(float total, float count,
                                                 const float (&reciprocal)[kReciprocals]) {
  const float r = *reinterpret_cast<const float*>(
      reinterpret_cast<const unsigned char*>(reciprocal) + reciprocal_place(count));
  const float quotient = total * r;
  return fused(fused(-quotient, count, total), r, quotient);
}

// Four counts in a number, which is exact up to 2^24: each of up to kMostCounted.
constexpr int kCountBits = 6;
constexpr int kMostCounted = (1 << kCountBits) - 1;
__device__ constexpr float one_of(int which) {
  return static_cast<float>(1u << (kCountBits * which));
}
__device__ __forceinline__ unsigned counted(float counts, int which) {
  return static_cast<unsigned>(counts) >> (kCountBits * which) &
         static_cast<unsigned>(kMostCounted);
}

// P is kFirst or kSampled, as in apply.cu; Vote: an election by sum, else none; Unit: all weights
// are 1 and the merge is a mean. Persistent grid over the tiles.
template <int K, class T, Pass P, bool Vote, bool Unit>
__global__ void __launch_bounds__(kThreads, fast_blocks(K, P == Pass::kSampled, Unit))
    fast(const __grid_constant__ Batch batch) {
  constexpr int V = Packed<T>::width;
  constexpr bool Sampled = P == Pass::kSampled;
  // Where registers are short.
  constexpr bool kCramped = Sampled && K >= (Unit ? 8 : 7);
  constexpr bool kMoreCramped = kCramped && !Unit && K == 8;
  // Elements that are looked at together for what is not finite.
  constexpr int kTogether = kCramped ? 2 : 4;
  constexpr int kNumbers = (K + 3) / 4;
  constexpr int kTilesPerHandover = kMostCounted / (kTile / kThreads);
  __shared__ Current now;
  __shared__ float reciprocal[Unit ? kReciprocals : 1];
  const int thread = static_cast<int>(threadIdx.x);
  clear(now.block);
  if (Sampled) clear(now.recorder);
  if (thread < 4) now.others[thread] = 0;
  if (Unit) {
    for (int j = thread; j < kReciprocals; j += kThreads) reciprocal[j] = reciprocal_at(j);
  }
  __syncthreads();

  // A thread's counts of a few tiles. Numbers, not integers, which would compete with the
  // comparisons for the same units.
  float kept_of[kNumbers] = {};
  float votes = 0;  // conflicts; those of sum 0; sums that are not 0; those that are turned down
  unsigned evaluated = 0;
  int current = -1, handover = 0;
  bool wanted = false;

  const auto hand_over = [&]() {
    const bool leader = thread % 32 == 0;
    const unsigned all = warp_sum(evaluated);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned here = warp_sum(counted(kept_of[k / 4], k % 4));
      const unsigned kept = now.model[k].all ? all : here;
      if (!leader || kept == 0) continue;
      atomicAdd(&now.block.kept[k], kept);
      // What is above the bracket is what is kept but for the candidates among it, which
      // `slow_path` takes off.
      if (Sampled && !now.model[k].collapsed) atomicAdd(&now.block.above[k], kept);
    }
    unsigned sums[4] = {};
#pragma unroll
    for (int j = 0; j < (Vote ? 4 : 1); ++j) sums[j] = warp_sum(counted(votes, j));
    if (leader) {
      // Upwards, what is turned down has elected -; downwards, what is not has elected +.
      const unsigned positive = now.zero_sign > 0 ? sums[2] - sums[3] : all - sums[3];
      if (sums[0]) atomicAdd(&now.others[0], sums[0]);
      if (Vote) {
        atomicAdd(&now.others[1], positive);
        atomicAdd(&now.others[2], sums[2] - positive);
        if (sums[1]) atomicAdd(&now.others[3], sums[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kNumbers; ++j) kept_of[j] = 0;
    votes = 0;
    evaluated = 0;
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
        now.limits = (Sampled ? batch.estimate : batch.limit) + static_cast<std::int64_t>(t) * K;
        now.zero_sign = now.tensor.zero_sign < 0 ? -1 : 1;
        now.wanted =
            Sampled ? !was_missed(batch, t) : batch.sampled == nullptr || was_missed(batch, t);
      }
      if (thread < K) fast_model<P>(batch, now, t, thread);
      __syncthreads();
      wanted = now.wanted;
      current = t;
    }
    if (!wanted) continue;
    // This thread's elements of the tile that are left to `slow_path`, one bit each: all of it; the
    // candidates.
    unsigned odd = 0, candidates = 0;
    bool again = false;  // the candidates' values are to be made anew: sixths, and NaN (N2)
    const std::int64_t start = (tile - now.tensor.tile_begin) * kTile;
    const int length =
        static_cast<int>(min(now.tensor.n - start, static_cast<std::int64_t>(kTile)));

    // Collapsed: of some model it is to be counted what lies above the bracket.
    const auto over_tile = [&](auto some_collapsed) {
      constexpr bool Collapsed = decltype(some_collapsed)::value;
      float above_of[kNumbers] = {};
      // Read anew for each tile, so that nothing of it is held while `slow_path` runs.
      [[maybe_unused]] float lower[K], cut[K], vote[K];
      Pair near[K], product[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const FastModel& model = now.model[k];
        lower[k] = model.lower, vote[k] = model.vote;
        if (!kMoreCramped) cut[k] = model.cut;
        if (!kMoreCramped) near[k] = model.near;
        if (!kCramped) product[k] = model.product;
      }
      const float scaling = static_cast<float>(now.tensor.scaling);
      [[maybe_unused]] const float divisor = now.divisor;
      // S elects - where it is below this: T4's zero sign.
      const float turning = bit_cast<float>(now.zero_sign > 0 ? 0u : 1u);
      [[maybe_unused]] const bool by_count = batch.merge == Merge::kMean;
#pragma unroll 1
      for (int step = 0; step < kTile / (V * kThreads); ++step) {
        const int place = V * (step * kThreads + thread);
        if (place + V > length) {  // the tensor's last few, or beyond
          if (place < length) odd |= ((1u << (length - place)) - 1u) << (step * V);
          continue;
        }
        const std::int64_t i = start + place;
        // Without a base, -0 takes its place: x - (-0) is x (but for the sign of a zero, which
        // decides nothing without an infinity or a division by it), and -0 + y is y.
        std::uint32_t base[4], model[K][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) base[j] = Packed<T>::minus_zero;
        // Volatile: addresses are read from shared memory each time, which costs less than two
        // registers for each.
        if (const void* data = *const_cast<const void* const volatile*>(&now.tensor.base))
          read16(static_cast<const T*>(data) + i, base);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const void* const volatile* data = &now.model[k].data;
          read16(static_cast<const T*>(*data) + i, model[k]);
        }
        float result[V];
        unsigned odd_here = 0, near_here = 0;
#pragma unroll
        for (int first = 0; first < V; first += kTogether) {
          float b[kTogether], delta[kTogether][K], large[kTogether];
#pragma unroll
          for (int e = 0; e < kTogether; ++e) {  // T1
            b[e] = Packed<T>::get(base, first + e);
            large[e] = 0;
#pragma unroll
            for (int k = 0; k < K; ++k) {
              delta[e][k] = Packed<T>::get(model[k], first + e) - b[e];
              large[e] = fused(delta[e][k], kRoom, large[e]);
            }
          }
          float largest = large[0];
#pragma unroll
          for (int e = 1; e < kTogether; ++e) largest = largest + large[e];
          if (!(fabsf(largest) < HUGE_VALF)) {  // NaN, infinity, or so large that a sum might be
            odd_here |= ((1u << kTogether) - 1u) << first;
#pragma unroll
            for (int e = 0; e < kTogether; ++e) result[first + e] = 0;
            continue;
          }
          evaluated += kTogether;
#pragma unroll
          for (int e = 0; e < kTogether; ++e) {
            float sum = 0, value[K];
            bool inside = false, plus = false, minus = false;
#pragma unroll
            for (int k = 0; k < K; ++k) {  // T3, T4
              const float size = fabsf(delta[e][k]);
              const bool kept = size >= lower[k];
              if (kept) kept_of[k / 4] = kept_of[k / 4] + one_of(k % 4);
              if (Sampled) {
                if constexpr (Collapsed) {
                  float from = cut[k];
                  if constexpr (kMoreCramped) from = read_anew(now.model[k].cut);
                  if (size >= from) above_of[k / 4] = above_of[k / 4] + one_of(k % 4);
                }
                const Pair bracket = kMoreCramped ? read_anew(now.model[k].near) : near[k];
                inside = inside || fabsf(size - bracket.first) <= bracket.second;
              }
              if constexpr (Unit) {
                value[k] = delta[e][k];
                if (kept) sum = sum + value[k];
              } else {
                const float voted = delta[e][k] * vote[k];
                value[k] = kept ? voted : 0.0f;
                if (Vote) {
                  sum = sum + value[k];
                } else {
                  plus = plus || value[k] > 0;
                  minus = minus || value[k] < 0;
                }
              }
            }
            const bool down = sum < turning;
            const float direction = down ? -1.0f : 1.0f;
            float total = 0, by = 0;
            bool opposed = false;
#pragma unroll
            for (int k = 0; k < K; ++k) {  // T5
              if constexpr (Unit) {
                // What is kept and agrees is, turned that way, a number from the threshold on.
                const float turned = value[k] * direction;
                if (turned >= lower[k]) {
                  total = total + value[k];
                  by = by + 1.0f;
                }
                opposed = opposed || turned <= -lower[k];
              } else {
                bool agreeing = fabsf(delta[e][k]) >= lower[k];
                if (Vote) {
                  const float turned = value[k] * direction;
                  agreeing = turned > 0;
                  opposed = opposed || turned < 0;
                }
                const Pair weight = kCramped ? read_anew(now.model[k].product) : product[k];
                const float weighted = delta[e][k] * weight.first;
                if (agreeing) {
                  total = total + weighted;
                  by = by + (Vote ? weight.second : 1.0f);  // without a vote only kMean looks at it
                }
              }
            }
            float merged;
            if constexpr (!Unit) {
              if (!Vote && !by_count) by = divisor;
              merged = total / (by == 0 ? 1.0f : by);
            } else if constexpr (K <= 2) {
              merged = by == 2 ? total * 0.5f : total;
            } else {
              merged = divide_by_count(total, by, reciprocal);
              if (K >= 6 && by == 6 && fabsf(total) < kSafeTotal) {
                near_here |= 1u << (first + e);
                again = true;
              }
            }
            result[first + e] = b[e] + merged * scaling;  // T6
            // With a vote: where S is not 0 somebody voted for its sign, and S = 0 with votes takes
            // both signs; so a vote against the elected sign is a conflict.
            const bool conflict = Vote ? opposed : plus && minus;
            if (conflict) votes = votes + one_of(0);
            if (Vote) {
              if (conflict && sum == 0) votes = votes + one_of(1);
              if (sum != 0) votes = votes + one_of(2);
              if (down) votes = votes + one_of(3);
            }
            if (Sampled && inside) near_here |= 1u << (first + e);
          }
        }
        if constexpr (!Unit) {
          // NaN where a result is not finite: weights make infinities, which cancel.
          float unusual = 0;
#pragma unroll
          for (int e = 0; e < V; ++e) unusual = fused(result[e], 0.0f, unusual);
          if (unusual != 0) {
            near_here = (1u << V) - 1u;
            again = true;
          }
        }
        odd |= odd_here << (step * V);
        if (Sampled || !Unit || K >= 6) candidates |= near_here << (step * V);
        std::uint32_t packed[4];
        Packed<T>::put(packed, result);
        void* const volatile* out = &now.tensor.out;
        write_output(static_cast<T*>(*out) + i,
                     make_uint4(packed[0], packed[1], packed[2], packed[3]));
      }
      if constexpr (Collapsed) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned above = warp_sum(counted(above_of[k / 4], k % 4));
          if (above && now.model[k].collapsed && thread % 32 == 0)
            atomicAdd(&now.block.above[k], above);
        }
      }
    };
    bool collapsed = false;
    if (Sampled) {
#pragma unroll
      for (int k = 0; k < K; ++k) collapsed = collapsed || now.model[k].collapsed;
    }
    if (Sampled && collapsed)
      over_tile(std::true_type());
    else
      over_tile(std::false_type());

    for (unsigned left = odd | candidates; left != 0; left &= left - 1) {
      const int bit = __ffs(left) - 1;
      const int place = V * (bit / V * kThreads + thread) + bit % V;
      const bool whole = (odd >> bit & 1u) != 0;
      slow_path<P>(batch, now, start + place,
                   (whole || again ? kValue : 0u) | (whole ? kCounts : 0u));
    }
    if (++handover == kTilesPerHandover) hand_over();
    if (Sampled && !flush(batch, t, tile, now.recorder)) wanted = false;
  }
  if (current >= 0) finish(current);
}

template <int K, class T>
void fast_pass(const Batch& batch, int processors, Pass pass, cudaStream_t stream) {
  const std::int64_t most =
      static_cast<std::int64_t>(processors) * fast_blocks(K, pass == Pass::kSampled, batch.unit);
  const dim3 grid(static_cast<unsigned>(std::min(batch.tiles, most)));
  const auto kernel = pass == Pass::kSampled ? batch.unit ? &fast<K, T, Pass::kSampled, true, true>
                                                          : &fast<K, T, Pass::kSampled, true, false>
                      : batch.elect == Elect::kNone ? &fast<K, T, Pass::kFirst, false, false>
                      : batch.unit                  ? &fast<K, T, Pass::kFirst, true, true>
                                                    : &fast<K, T, Pass::kFirst, true, false>;
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
