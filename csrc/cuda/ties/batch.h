// Job descriptors: tables in device memory, and by value a Batch that points to them.
// Written by the host (ties.cu), carried to the device as kernel parameters (core/prepare.cu), so
// that a captured graph owns its copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/key.h"
#include "common/ties.h"
#include "cuda/core/tuning.h"

namespace pymerge::cuda {

constexpr int kMaxModels = 64;

// One model of one tensor. The scalars are rounded to the working precision already.
struct ModelEntry {
  const void* data;
  double weight;         // w_k
  double elect;          // e_k
  double divisor;        // d_k, for T3r `density`
  std::uint64_t cutoff;  // T3 random
  DType dtype;
  std::int32_t aligned;  // to 16 bytes, the width of a vector access
};

struct TensorEntry {
  const void* base;
  void* out;
  std::int64_t* stats;  // this tensor's counts, stats_words(K) of them
  std::int64_t n;
  std::int64_t tile_begin;   // of its first tile among the batch's tiles of kTile elements
  std::int64_t chunk_begin;  // the same for the chunks of T9
  std::uint64_t key;         // T8
  std::int64_t first;        // T8: of the tensor's elements, where this is a part
  double scaling;
  double every_weight;  // sum of all w_k in model order
  DType base_dtype;     // of no meaning where base is null
  DType out_dtype;
  std::int32_t base_aligned;
  std::int32_t out_aligned;
  std::int32_t zero_sign;  // +1, -1, or 0 where the majority is to be found
  std::int32_t sampled;
  std::int64_t quad_begin;  // of its first group of four sampled units
  std::int64_t units;       // sampled, a multiple of 4
  std::int64_t record_begin, record_capacity;
};

// The search for one order statistic, by radix from the top bit down.
struct Selector {
  std::uint64_t prefix;  // the key's bits found so far
  std::uint64_t rank;    // how many of the keys with that prefix are still to be passed
  std::uint32_t active;  // 0: found, or never to be looked for
  std::uint32_t pad;
};

// T3 and T3r per model: what is kept, as keys, and the ratio of norms.
struct Limit {
  std::uint64_t lower, upper;
  double factor;
};

// One threshold from a sample: what the sample says, then what the pass counted. Keys are of
// binary32.
struct SampledThreshold {
  std::uint64_t sample_above;  // sampled keys over the window
  std::uint64_t spread;        // sum of squared differences of neighbouring units' counts
  std::uint64_t above;         // keys of the tensor from `cut` on
  std::uint64_t rank;          // of the threshold inside its bin of the bracket, from the top
  std::uint32_t window;        // lowest key of the window
  std::uint32_t window_shift;  // a bin of the window holds 2^shift keys
  std::uint32_t middle;        // the coarse estimate
  std::uint32_t low, high;     // the bracket [low, high): its keys are recorded
  std::uint32_t
      cut;  // high; or one over the estimate where the bracket has collapsed to that value
  std::uint32_t shift;  // a bin of the bracket holds 2^shift keys
  std::uint32_t bin;    // of the bracket, that holds the threshold
  std::uint32_t stage;  // kOff, ...
  std::uint32_t pad;
};
enum : std::uint32_t { kOff = 0, kWindow = 1, kBracket = 2, kCollapsed = 3, kRefine = 4 };

// What a pass over the outputs is for: counts and outputs; outputs again, where the majority is -;
// counts and outputs by estimated limits, with the candidates recorded.
enum class Pass { kFirst, kAgain, kSampled };

// What a pass leaves for the next one, per tensor.
struct TensorState {
  std::uint64_t sensitive;  // elements whose output depends on the zero sign
  std::uint64_t records;    // candidate words handed out
  std::uint32_t missed;     // 1: not sampled, or a bracket missed: the exact passes are to run
  std::uint32_t pad;
};

constexpr std::uint64_t kKeepNone = ~std::uint64_t(0);

// Words of the counts that a tensor ends with: kept[K], non_finite[K], thresholds[K] (bits of a
// double), conflicts, positive, negative, and whether one of its brackets missed.
PYMERGE_HD constexpr int stats_words(int models) { return 3 * models + 4; }

struct Batch {
  std::int32_t models;   // K
  std::int32_t tensors;  // T
  std::int32_t rows;     // rows of selectors and limits: T, or 1 where all tensors share them (T7)
  std::int32_t
      selectors;  // per row: K, or 2 K with both ends of a band; selector s is of model s % K
  Trim trim;
  Elect elect;
  Merge merge;
  Rescale rescale;
  bool unit;  // for fast.cuh: every e_k and w_k is 1, and the merge a mean
  std::int64_t tiles;
  std::int64_t chunks;
  const TensorEntry* tensor;  // [T]
  const ModelEntry* model;    // [T][K]
  Selector* selector;         // [rows][selectors]
  Limit* limit;               // [rows][K]
  TensorState* state;         // [T]
  std::uint64_t* histogram;   // [rows][selectors][histogram_words]
  std::int64_t histogram_words;
  std::int64_t quads;
  SampledThreshold* sampled;   // [T][K], where thresholds are sampled
  Limit* estimate;             // [T][K]: limits as estimated
  std::uint32_t* record;       // (key - low) << 12 | place in the tile
  std::uint32_t* tile_record;  // [tiles]: where a tile's records start
  std::uint16_t* tile_count;   // [tiles][K]: how many of each model, in order
  unsigned* ticket;            // blocks that have finished, per radix level
  double* norm;                // [K][2][chunks]
};

}  // namespace pymerge::cuda
