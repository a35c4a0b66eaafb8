// What the kernels are told: tables in device memory, and by value a Batch that points to them.
// Written by the host (ties.cu), carried to the device as kernel parameters (prepare.cu), so that a
// captured graph owns its copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/steps.h"
#include "tuning.h"

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
  std::int32_t aligned;  // four elements at a multiple of 4 can be read at once
};

struct TensorEntry {
  const void* base;
  void* out;
  std::int64_t* stats;  // this tensor's counts, stats_words(K) of them
  std::int64_t n;
  std::int64_t tile_begin;   // of its first tile among the batch's tiles of kTile elements
  std::int64_t chunk_begin;  // the same for the chunks of T9
  std::uint64_t key;         // T8
  double scaling;
  double every_weight;  // sum of all w_k in model order
  DType base_dtype;     // of no meaning where base is null
  DType out_dtype;
  std::int32_t base_aligned;
  std::int32_t out_aligned;
  std::int32_t zero_sign;  // +1, -1, or 0 where the majority is to be found
  std::int32_t pad;
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

// What a pass leaves for the next one, per tensor.
struct TensorState {
  std::uint64_t sensitive;  // elements whose output depends on the zero sign
  std::uint64_t records;    // candidate words handed out
  std::uint32_t missed;     // the speculation failed: the exact passes are to run
  std::uint32_t pad;
};

constexpr std::uint64_t kKeepNone = ~std::uint64_t(0);

// Words of the counts that a tensor ends with: kept[K], non_finite[K], thresholds[K] (bits of a
// double), conflicts, positive, negative.
constexpr int stats_words(int models) {
  return 3 * models + 3;
}

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
  std::int64_t tiles;
  std::int64_t chunks;
  const TensorEntry* tensor;  // [T]
  const ModelEntry* model;    // [T][K]
  Selector* selector;         // [rows][selectors]
  Limit* limit;               // [rows][K]
  TensorState* state;         // [T]
  std::uint64_t* histogram;   // [rows][selectors][kBins]
  double* norm;               // [K][2][chunks]
};

}  // namespace pymerge::cuda
