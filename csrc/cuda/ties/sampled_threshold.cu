// Sampled thresholds, around the main pass (apply.cu, fast_*.cu): a sample brackets each threshold;
// the main pass decides by the estimate, counts what lies above the bracket and records what lies
// inside; then the threshold is an order statistic of the records, and the few outputs between
// estimate and threshold are made again. The counts prove the bracket; where they disprove it, or
// the records do not fit, the tensor is marked as missed and the exact passes run.
//
//   coarse    one block a model: 8192 keys -> a window round the threshold
//   sample    8 n^(2/3) or more keys -> histogram of the window
//   bracket   one block a model: the bracket and the estimate
//   (main pass)
//   resolve   one block a model: prove the bracket, find the bin of the threshold
//   refine    the records of that bin -> histogram of single keys
//   settle    one block a model: the threshold
//   fix_up    outputs and counts of the elements that the estimate decided wrongly
//
// Integer counts throughout: any order of blocks gives the same result.

#include <algorithm>
#include <cmath>

#include "cuda/core/radix.cuh"
#include "cuda/ties/element.cuh"
#include "cuda/ties/kernels.h"
#include "cuda/ties/record.cuh"

namespace pymerge::cuda {
namespace {

constexpr std::uint32_t kOverAll = 0x7f800001u;  // one over the key of infinity
constexpr unsigned kNoRank = 1u << 20;           // widest bracket, in keys: the room in a record
constexpr int kUnitLanes = kUnit / kWidth;       // threads that read a unit
constexpr int kQuadLanes = 4 * kUnitLanes;       // and four neighbouring ones
static_assert(kUnit % kWidth == 0 && 32 % kQuadLanes == 0,
              "a quad is of whole vectors, in one warp");

// A unit inside stratum j of m over `all` units: stratified and jittered.
__device__ __forceinline__ std::int64_t jittered(std::int64_t j, std::int64_t m, std::int64_t all) {
  std::uint64_t hash = static_cast<std::uint64_t>(j) * 0x9E3779B97F4A7C15ull;
  hash ^= hash >> 29;
  hash *= 0xBF58476D1CE4E5B9ull;
  hash >>= 32;
  // j * (all / m) without overflow: all < 2^58, m < 2^32.
  const std::int64_t length = all / m, rest = all % m;
  const std::int64_t begin = j * length + j * rest / m;
  return begin + static_cast<std::int64_t>((hash * static_cast<std::uint64_t>(length)) >> 32);
}

__device__ __forceinline__ bool searching(const Batch& batch, int t, int k) {
  return batch.tensor[t].sampled != 0 &&
         batch.selector[static_cast<std::int64_t>(t) * batch.models + k].active != 0;
}

__device__ __forceinline__ unsigned* bins_of(const Batch& batch, int t, int k) {
  return reinterpret_cast<unsigned*>(
      batch.histogram + (static_cast<std::int64_t>(t) * batch.models + k) * batch.histogram_words);
}

// The rank-th largest of the keys in shared memory, 1 <= rank <= count.
__device__ std::uint32_t block_select(const std::uint32_t* keys, int count, std::uint64_t rank,
                                      unsigned* bins) {
  const int thread = static_cast<int>(threadIdx.x);
  std::uint64_t prefix = 0;
  bool found = false;
  for (int level = 0; level < Radix<float>::levels && !found; ++level) {
    for (int j = thread; j < kBins; j += kThreads) bins[j] = 0;
    __syncthreads();
    for (int j = thread; j < count; j += kThreads) {
      const int bin = bin_of<float>(keys[j], prefix, level);
      if (bin >= 0) atomicAdd(&bins[bin], 1u);
    }
    __syncthreads();
    found = advance<float>(prefix, rank, block_pick(bins, rank), level);
  }
  return static_cast<std::uint32_t>(prefix);
}

__global__ void __launch_bounds__(kThreads) coarse(const __grid_constant__ Batch batch) {
  constexpr int count = kCoarseUnits * kUnit;
  __shared__ std::uint32_t keys[count];
  __shared__ unsigned bins[kBins];
  __shared__ unsigned in_unit[kCoarseUnits];
  __shared__ unsigned spread;
  const int t = static_cast<int>(blockIdx.x) / batch.models,
            k = static_cast<int>(blockIdx.x) % batch.models;
  const int thread = static_cast<int>(threadIdx.x);
  if (!searching(batch, t, k)) return;
  const TensorEntry& tensor = batch.tensor[t];
  const ModelEntry& model = batch.model[static_cast<std::int64_t>(t) * batch.models + k];
  const std::int64_t all = tensor.n / kUnit;
  for (int j = kWidth * thread; j < count; j += kWidth * kThreads) {
    const std::int64_t i = jittered(j / kUnit, kCoarseUnits, all) * kUnit + j % kUnit;
    float base[kWidth], delta[kWidth];
    load_base<float>(tensor, i, kWidth, base);
    task_vector<float>(tensor, model, base, i, kWidth, delta);
#pragma unroll
    for (int v = 0; v < kWidth; ++v) keys[j + v] = magnitude_key(delta[v]);
  }
  if (thread == 0) spread = 0;
  __syncthreads();
  const std::uint64_t rank = batch.selector[static_cast<std::int64_t>(t) * batch.models + k].rank;
  const double share = static_cast<double>(rank) / static_cast<double>(tensor.n);
  const int middle_rank = max(1, min(count, static_cast<int>(share * count + 0.5)));
  const std::uint32_t middle =
      block_select(keys, count, static_cast<std::uint64_t>(middle_rank), bins);
  for (int unit = thread; unit < kCoarseUnits; unit += kThreads) {
    unsigned own = 0;
    for (int j = 0; j < kUnit; ++j) own += keys[unit * kUnit + (j + thread) % kUnit] >= middle;
    in_unit[unit] = own;
  }
  __syncthreads();
  for (int unit = 2 * thread; unit < kCoarseUnits; unit += 2 * kThreads) {
    const int difference = static_cast<int>(in_unit[unit]) - static_cast<int>(in_unit[unit + 1]);
    atomicAdd(&spread, static_cast<unsigned>(difference * difference));
  }
  __syncthreads();
  const int margin = static_cast<int>(kWindowSigmas * sqrt(static_cast<double>(spread)) + 4.0);
  const int top_rank = middle_rank - margin, bottom_rank = middle_rank + margin;
  const std::uint32_t top =
      top_rank < 1 ? kOverAll - 1
                   : block_select(keys, count, static_cast<std::uint64_t>(top_rank), bins);
  const std::uint32_t bottom =
      bottom_rank > count
          ? 0u
          : block_select(keys, count, static_cast<std::uint64_t>(bottom_rank), bins);
  if (thread == 0) {
    SampledThreshold& sampled = batch.sampled[blockIdx.x];
    std::uint32_t shift = 0;
    while (((top - bottom) >> shift) >= kBins) ++shift;
    sampled.window = bottom;
    sampled.window_shift = shift;
    sampled.middle = middle;
    sampled.stage = kWindow;
  }
}

// Keys of a block's share of the sample into the window's bins, one model after the other; the
// share is small enough to stay in cache. Half a warp takes four neighbouring units.
__global__ void __launch_bounds__(kThreads, histogram_blocks(sizeof(float)))
    sample(const __grid_constant__ Batch batch, std::int64_t quads_per_block) {
  __shared__ unsigned bins[3][kBins];  // how many; the smallest key, inverted; the largest
  __shared__ unsigned above, spread;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, K = batch.models;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * quads_per_block;
  const std::int64_t end = min(batch.quads, begin + quads_per_block);
  for (int j = thread; j < kBins; j += kThreads) bins[0][j] = bins[1][j] = bins[2][j] = 0;
  std::int64_t from = begin;
  while (from < end) {  // one tensor after the other
    const int t = find_tensor<&TensorEntry::quad_begin>(batch, from);
    const TensorEntry& tensor = batch.tensor[t];
    const std::int64_t stop =
        min(end, t + 1 < batch.tensors ? batch.tensor[t + 1].quad_begin : batch.quads);
    const std::int64_t all = tensor.n / kUnit;
    for (int k = 0; k < K; ++k) {
      if (!searching(batch, t, k)) continue;
      SampledThreshold& sampled = batch.sampled[static_cast<std::int64_t>(t) * K + k];
      const std::uint32_t window = sampled.window, shift = sampled.window_shift,
                          middle = sampled.middle;
      const ModelEntry& model = batch.model[static_cast<std::int64_t>(t) * K + k];
      if (thread == 0) above = spread = 0;
      __syncthreads();
      unsigned over = 0, squares = 0;
      for (std::int64_t first = from; first < stop; first += kThreads / kQuadLanes) {
        const std::int64_t quad = first + thread / kQuadLanes;
        const int many = quad < stop ? kWidth : 0;  // a warp goes round as a whole
        const std::int64_t unit = (quad - tensor.quad_begin) * 4 + thread % kQuadLanes / kUnitLanes;
        const std::int64_t i =
            jittered(unit, tensor.units, all) * kUnit + thread % kUnitLanes * kWidth;
        float base[kWidth], delta[kWidth];
        load_base<float>(tensor, i, many, base);
        task_vector<float>(tensor, model, base, i, many, delta);
        unsigned own = 0;
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
          const std::uint32_t key = magnitude_key(delta[v]);
          if (v >= many) continue;
          own += key >= middle;
          if (key < window) continue;
          const std::uint32_t bin = (key - window) >> shift;
          if (bin >= kBins) {
            ++over;
          } else {
            atomicAdd(&bins[0][bin], 1u);
            atomicMax(&bins[1][bin], ~key);
            atomicMax(&bins[2][bin], key);
          }
        }
        for (int width = kUnitLanes / 2; width > 0; width /= 2)
          own += __shfl_xor_sync(0xffffffffu, own, width);
        const int difference =
            static_cast<int>(own) - static_cast<int>(__shfl_xor_sync(0xffffffffu, own, kUnitLanes));
        if (lane % (2 * kUnitLanes) == 0) squares += static_cast<unsigned>(difference * difference);
      }
      over = warp_sum(over);
      squares = warp_sum(squares);
      if (lane == 0) {
        if (over) atomicAdd(&above, over);
        if (squares) atomicAdd(&spread, squares);
      }
      __syncthreads();
      unsigned* into = bins_of(batch, t, k);
      for (int j = thread; j < kBins; j += kThreads) {
        if (bins[0][j] == 0) continue;
        atomicAdd(&into[j], bins[0][j]);
        atomicMax(&into[kBins + j], bins[1][j]);
        atomicMax(&into[2 * kBins + j], bins[2][j]);
        bins[0][j] = bins[1][j] = bins[2][j] = 0;
      }
      if (thread == 0) {
        if (above) add(&sampled.sample_above, above);
        if (spread) add(&sampled.spread, spread);
      }
      __syncthreads();
    }
    from = stop;
  }
}

// The bin and the place in it of a rank among the sampled keys; bin -1 where the window does not
// hold it.
struct Placed {
  int bin;
  std::uint64_t into;   // 1 for the largest key of the bin
  std::uint64_t above;  // keys of the window over the bin
};

__device__ Placed place(const unsigned* bins, std::uint64_t above, double rank) {
  if (rank <= static_cast<double>(above)) return Placed{-1, 0, 0};
  const std::uint64_t inside = static_cast<std::uint64_t>(rank) - above;
  const Picked picked = block_pick(bins, inside);
  return Placed{picked.bin, inside - picked.above, picked.above};
}

__global__ void __launch_bounds__(kThreads) bracket(const __grid_constant__ Batch batch) {
  const int t = static_cast<int>(blockIdx.x) / batch.models,
            k = static_cast<int>(blockIdx.x) % batch.models;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t own = static_cast<std::int64_t>(t) * batch.models + k;
  const TensorEntry& tensor = batch.tensor[t];
  Limit& estimate = batch.estimate[own];
  if (thread == 0) {
    estimate = batch.limit[own];
    if (tensor.sampled == 0) batch.state[t].missed = 1;
  }
  if (!searching(batch, t, k)) return;
  SampledThreshold& sampled = batch.sampled[own];
  unsigned* bins = bins_of(batch, t, k);
  const double size = static_cast<double>(tensor.units) * kUnit;
  const double scale = size / static_cast<double>(tensor.n);
  const double middle = static_cast<double>(batch.selector[own].rank) * scale;
  const double sigma = sqrt(static_cast<double>(sampled.spread));
  const std::uint64_t above = sampled.sample_above;
  const std::uint32_t window = sampled.window, shift = sampled.window_shift;
  const double room = 0.9 * static_cast<double>(tensor.record_capacity) / batch.models * scale;
  const Placed center = place(bins, above, fmin(size, fmax(1.0, floor(middle + 0.5))));
  std::uint32_t low = 0, high = 0, estimated = 0, stage = kOff;
  for (int attempt = 0; attempt < 2 && stage == kOff && center.bin >= 0; ++attempt) {
    const double margin = (attempt == 0 ? kBracketSigmas : kTightSigmas) * sigma + 2.0;
    const Placed top = place(bins, above, floor(middle - margin));
    const Placed bottom = place(bins, above, ceil(middle + margin));
    if (top.bin < 0 || bottom.bin < 0) continue;
    const std::uint32_t smallest = ~bins[kBins + center.bin],
                        largest = bins[2 * kBins + center.bin];
    low = window + (static_cast<std::uint32_t>(bottom.bin) << shift);
    high = window + (static_cast<std::uint32_t>(top.bin + 1) << shift);
    if (top.bin == bottom.bin && smallest == largest) {  // safely inside the estimate's own atom
      estimated = smallest;
      stage = kCollapsed;
    } else {
      const double records =
          static_cast<double>(bottom.above + bins[bottom.bin] - top.above);  // among the sampled
      if (records > room || high - low > kNoRank) continue;
      const double share = (static_cast<double>(center.into) - 0.5) / bins[center.bin];
      const std::uint32_t floor_key = window + (static_cast<std::uint32_t>(center.bin) << shift);
      estimated = smallest == largest
                      ? smallest
                      : floor_key + static_cast<std::uint32_t>((1.0 - share) *
                                                               static_cast<double>(1u << shift));
      stage = kBracket;
    }
  }
  __syncthreads();
  for (int j = thread; j < 3 * kBins; j += kThreads) bins[j] = 0;
  if (thread != 0) return;
  sampled.stage = stage;
  if (stage == kOff) {
    batch.state[t].missed = 1;
    return;
  }
  sampled.low = low;
  sampled.high = high;
  sampled.cut = stage == kCollapsed ? estimated + 1 : high;
  std::uint32_t fine = 0;
  while (stage == kBracket && ((high - low - 1) >> fine) >= kBins) ++fine;
  sampled.shift = fine;
  estimate.lower = estimated;
}

// After the main pass: does the bracket hold the threshold, and in which bin?
__global__ void __launch_bounds__(kThreads) resolve(const __grid_constant__ Batch batch) {
  __shared__ bool complete;
  const int t = static_cast<int>(blockIdx.x) / batch.models,
            k = static_cast<int>(blockIdx.x) % batch.models;
  const std::int64_t own = static_cast<std::int64_t>(t) * batch.models + k;
  if (!searching(batch, t, k)) return;
  SampledThreshold& sampled = batch.sampled[own];
  if (sampled.stage < kBracket) return;
  Selector& selector = batch.selector[own];
  const std::uint64_t rank = selector.rank, above = sampled.above;
  if (sampled.stage == kCollapsed) {  // c(> t) < rank <= c(>= t)
    if (threadIdx.x != 0) return;
    const std::uint64_t through = static_cast<std::uint64_t>(batch.tensor[t].stats[k]);
    if (!was_missed(batch, t) && above < rank && rank <= through) {
      batch.limit[own].lower = batch.estimate[own].lower;
      selector.active = 0;
    } else {
      batch.state[t].missed = 1;
    }
    return;
  }
  if (threadIdx.x == 0) complete = !was_missed(batch, t) && above < rank;
  __syncthreads();
  const Picked picked = complete ? block_pick(bins_of(batch, t, k), rank - above) : Picked{0, -1};
  if (threadIdx.x != 0) return;
  if (picked.bin < 0) {
    batch.state[t].missed = 1;
    return;
  }
  sampled.bin = static_cast<std::uint32_t>(picked.bin);
  sampled.rank = rank - above - picked.above;
  sampled.stage = kRefine;
}

// The records in the threshold's bin, key by key. One warp a tile.
__global__ void __launch_bounds__(kThreads) refine(const __grid_constant__ Batch batch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, K = batch.models;
  const std::int64_t first =
      static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const std::int64_t all = static_cast<std::int64_t>(gridDim.x) * (kThreads / 32);
  for (std::int64_t tile = first; tile < batch.tiles; tile += all) {
    const int t = find_tensor<&TensorEntry::tile_begin>(batch, tile);
    if (batch.state[t].missed) continue;
    const std::uint32_t* record =
        batch.record + batch.tensor[t].record_begin + batch.tile_record[tile];
    for (int k = 0; k < K; ++k) {
      const int count = batch.tile_count[tile * K + k];
      const SampledThreshold& sampled = batch.sampled[static_cast<std::int64_t>(t) * K + k];
      if (sampled.stage == kRefine) {
        unsigned* single = bins_of(batch, t, k) + kBins;
        for (int j = lane; j < count; j += 32) {
          const std::uint32_t offset = record[j] >> 12;
          if (offset >> sampled.shift == sampled.bin)
            atomicAdd(&single[offset & ((1u << sampled.shift) - 1u)], 1u);
        }
      }
      record += count;
    }
  }
}

__global__ void __launch_bounds__(kThreads) settle(const __grid_constant__ Batch batch) {
  const int t = static_cast<int>(blockIdx.x) / batch.models,
            k = static_cast<int>(blockIdx.x) % batch.models;
  const std::int64_t own = static_cast<std::int64_t>(t) * batch.models + k;
  if (batch.tensor[t].sampled == 0) return;
  SampledThreshold& sampled = batch.sampled[own];
  unsigned* bins = bins_of(batch, t, k);
  if (sampled.stage == kRefine && batch.state[t].missed == 0) {
    const Picked picked = block_pick(bins + kBins, sampled.rank);
    if (threadIdx.x == 0) {
      batch.limit[own].lower =
          sampled.low + (sampled.bin << sampled.shift) + static_cast<std::uint32_t>(picked.bin);
      batch.selector[own].active = 0;
    }
  }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < 3 * kBins; j += kThreads)
    bins[j] = 0;  // for the exact passes
}

// Outputs and counts of what the estimates decided wrongly; a missed tensor's counts are cleared
// instead. One warp a tile.
__global__ void __launch_bounds__(kThreads, 2) fix_up(const __grid_constant__ Batch batch) {
  __shared__ int kept[kSampledModels];
  __shared__ int others[4];  // conflicts, positive, negative, sensitive
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, K = batch.models;
  const std::int64_t per_block = (batch.tiles + gridDim.x - 1) / gridDim.x;
  const std::int64_t end =
      min(batch.tiles, (static_cast<std::int64_t>(blockIdx.x) + 1) * per_block);
  std::int64_t from = static_cast<std::int64_t>(blockIdx.x) * per_block;
  while (from < end) {  // one tensor after the other
    const int t = find_tensor<&TensorEntry::tile_begin>(batch, from);
    const TensorEntry& tensor = batch.tensor[t];
    const std::int64_t stop =
        min(end, t + 1 < batch.tensors ? batch.tensor[t + 1].tile_begin : batch.tiles);
    const bool missed = batch.state[t].missed != 0;
    if (thread < kSampledModels) kept[thread] = 0;
    if (thread < 4) others[thread] = 0;
    __syncthreads();
    if (missed && from == tensor.tile_begin) {
      for (int j = thread; j < stats_words(K); j += kThreads) tensor.stats[j] = 0;
      if (thread == 0) batch.state[t].sensitive = 0;
    }
    const ModelEntry* models = batch.model + static_cast<std::int64_t>(t) * K;
    const Limit* before = batch.estimate + static_cast<std::int64_t>(t) * K;
    const Limit* after = batch.limit + static_cast<std::int64_t>(t) * K;
    const int zero_sign = tensor.zero_sign < 0 ? -1 : 1;
    for (std::int64_t tile = from + thread / 32; !missed && tile < stop; tile += kThreads / 32) {
      const std::uint32_t* record = batch.record + tensor.record_begin + batch.tile_record[tile];
      for (int k = 0; k < K; ++k) {
        const int count = batch.tile_count[tile * K + k];
        const std::uint32_t low = batch.sampled[static_cast<std::int64_t>(t) * K + k].low;
        const auto old_lower = static_cast<std::uint32_t>(before[k].lower);
        const auto new_lower = static_cast<std::uint32_t>(after[k].lower);
        for (int j = lane; j < count && old_lower != new_lower; j += 32) {
          const std::uint32_t key = low + (record[j] >> 12);
          if ((key >= old_lower) == (key >= new_lower)) continue;
          const std::int64_t i = (tile - tensor.tile_begin) * kTile + (record[j] & 0xfffu);
          const OneElement was = one_element(batch, tensor, models, before, zero_sign, i);
          const OneElement now = one_element(batch, tensor, models, after, zero_sign, i);
          const std::uint64_t changed = was.kept ^ now.kept;
          if (changed & ((std::uint64_t(1) << k) - 1))
            continue;  // a model before this one sees to it
          store_element<float>(tensor.out, tensor.out_dtype, i, now.value);
          for (int m = k; m < K; ++m) {
            if (changed >> m & 1u) atomicAdd(&kept[m], now.kept >> m & 1u ? 1 : -1);
          }
          const int difference[4] = {
              now.conflict - was.conflict, (now.outcome > 0) - (was.outcome > 0),
              (now.outcome < 0) - (was.outcome < 0),
              (now.outcome == 0 && now.anyone) - (was.outcome == 0 && was.anyone)};
#pragma unroll
          for (int j4 = 0; j4 < 4; ++j4) {
            if (difference[j4]) atomicAdd(&others[j4], difference[j4]);
          }
        }
        record += count;
      }
    }
    __syncthreads();
    if (!missed) {  // 64-bit sums wrap, so a negative difference adds as well
      if (thread < K && kept[thread])
        add(&tensor.stats[thread], static_cast<std::uint64_t>(std::int64_t(kept[thread])));
      if (thread < 3 && others[thread]) {
        add(&tensor.stats[3 * K + thread],
            static_cast<std::uint64_t>(std::int64_t(others[thread])));
      }
      if (thread == 3 && others[3]) {
        add(&batch.state[t].sensitive, static_cast<std::uint64_t>(std::int64_t(others[3])));
      }
    }
    __syncthreads();
    from = stop;
  }
}

}  // namespace

void launch_sample(const Batch& batch, int processors, cudaStream_t stream) {
  const dim3 one_each(static_cast<unsigned>(batch.tensors * batch.models));
  const auto first = &coarse;
  PYMERGE_LAUNCH(first, one_each, stream, batch);
  const std::int64_t most = static_cast<std::int64_t>(processors) * 8;
  const std::int64_t least = kThreads / kQuadLanes;
  const std::int64_t per_block = std::max(least, (batch.quads + most - 1) / most);
  const auto second = &sample;
  PYMERGE_LAUNCH(second, dim3(static_cast<unsigned>((batch.quads + per_block - 1) / per_block)),
                 stream, batch, per_block);
  const auto third = &bracket;
  PYMERGE_LAUNCH(third, one_each, stream, batch);
}

void launch_resolve(const Batch& batch, int processors, cudaStream_t stream) {
  const dim3 one_each(static_cast<unsigned>(batch.tensors * batch.models));
  const std::int64_t most = static_cast<std::int64_t>(processors) * 8;
  const std::int64_t tiles_each = kThreads / 32;
  const dim3 over_tiles(
      static_cast<unsigned>(std::min(most, (batch.tiles + tiles_each - 1) / tiles_each)));
  const auto first = &resolve;
  PYMERGE_LAUNCH(first, one_each, stream, batch);
  const auto second = &refine;
  PYMERGE_LAUNCH(second, over_tiles, stream, batch);
  const auto third = &settle;
  PYMERGE_LAUNCH(third, one_each, stream, batch);
  const auto fourth = &fix_up;
  PYMERGE_LAUNCH(fourth, over_tiles, stream, batch);
}

}  // namespace pymerge::cuda
