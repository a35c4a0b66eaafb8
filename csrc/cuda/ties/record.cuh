// Candidates: elements whose magnitude lies in their model's bracket. A block gathers those of a
// tile in shared memory and hands them over with one atomic; later passes find them by tile and
// model.
#pragma once

#include "cuda/ties/batch.cuh"

namespace pymerge::cuda {

struct Recorder {
  unsigned total;
  unsigned base;
  unsigned count[kSampledModels];
  std::uint32_t entry[kTileRecords];
  std::uint32_t owner[kTileRecords];  // model << 16 | which of the model's
};

__device__ __forceinline__ void clear(Recorder& recorder) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) recorder.total = 0;
  if (thread < kSampledModels) recorder.count[thread] = 0;
}

// place: of the element in its tile.
__device__ __forceinline__ void push(Recorder& recorder, int k, std::uint32_t offset,
                                     unsigned place) {
  const unsigned slot = atomicAdd(&recorder.total, 1u);
  if (slot >= kTileRecords) return;
  const unsigned own = atomicAdd(&recorder.count[k], 1u);
  recorder.entry[slot] = offset << 12 | place;
  recorder.owner[slot] = static_cast<std::uint32_t>(k) << 16 | own;
}

// Whether a tensor has been given up. In the main pass and in resolve other blocks may do so at any
// time: there one thread asks for all of its block.
__device__ __forceinline__ bool was_missed(const Batch& batch, int t) {
  const volatile std::uint32_t* missed = &batch.state[t].missed;
  return *missed != 0;
}

// Hands a tile's candidates over and counts them into the brackets' histograms; clears the
// recorder. All threads of the block call it; the last pushes need no barrier before, and new ones
// none after it. Where they do not fit, the tensor is marked as missed and the answer is false.
__device__ __forceinline__ bool flush(const Batch& batch, int t, std::int64_t tile,
                                      Recorder& recorder) {
  const int thread = static_cast<int>(threadIdx.x), K = batch.models;
  __syncthreads();
  const unsigned total = recorder.total;
  if (thread == 0) {
    unsigned base = 0;
    bool fits = total <= kTileRecords;
    if (total > 0 && fits) {
      const TensorEntry& tensor = batch.tensor[t];
      const Count from =
          atomicAdd(reinterpret_cast<Count*>(&batch.state[t].records), static_cast<Count>(total));
      fits = from + total <= static_cast<Count>(tensor.record_capacity);
      base = static_cast<unsigned>(from);
    }
    if (!fits) batch.state[t].missed = 1;
    recorder.base = fits ? base : ~0u;
    batch.tile_record[tile] = base;
  }
  __syncthreads();
  const bool fits = recorder.base != ~0u;
  for (int k = thread; k < K; k += kThreads) {
    batch.tile_count[tile * K + k] = static_cast<std::uint16_t>(fits ? recorder.count[k] : 0);
  }
  if (fits) {
    std::uint32_t* into = batch.record + batch.tensor[t].record_begin + recorder.base;
    for (unsigned j = static_cast<unsigned>(thread); j < total; j += kThreads) {
      const unsigned owner = recorder.owner[j];
      const int k = static_cast<int>(owner >> 16);
      unsigned before = owner & 0xffffu;
      for (int other = 0; other < k; ++other) before += recorder.count[other];
      const std::uint32_t entry = recorder.entry[j];
      into[before] = entry;
      const std::int64_t s = static_cast<std::int64_t>(t) * K + k;
      auto* bins = reinterpret_cast<unsigned*>(batch.histogram + s * batch.histogram_words);
      atomicAdd(&bins[entry >> 12 >> batch.sampled[s].shift], 1u);
    }
  }
  __syncthreads();
  clear(recorder);
  __syncthreads();
  return fits;
}

// What the main pass needs to know of a sampled threshold. `from` and `width`: the bracket; `cut`:
// see SampledThreshold.
struct Bracket {
  std::uint32_t from, width, cut;
};

__device__ __forceinline__ Bracket bracket_of(const SampledThreshold& sampled) {
  if (sampled.stage < kBracket) return Bracket{0, 0, ~0u};
  return Bracket{sampled.low, sampled.stage == kCollapsed ? 0u : sampled.high - sampled.low,
                 sampled.cut};
}

}  // namespace pymerge::cuda
