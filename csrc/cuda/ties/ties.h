// `ties` and `select` on an NVIDIA GPU (docs/spec/ties.md): what the bindings call. Plain C++,
// without CUDA's headers.
//
// Every function enqueues its kernels on the caller's stream and returns; nothing waits for the
// device, nothing is allocated, so a call can be captured in a CUDA graph. Inputs, output, scratch
// and stats are device memory, contiguous, that the caller keeps until the stream has passed.
// Throws std::invalid_argument and std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/key.h"
#include "common/ties.h"
#include "cuda/core/place.h"

namespace pymerge::cuda {

struct Operand {
  std::uintptr_t data = 0;
  DType dtype = DType::kFloat32;
};

// T3r: the norm that rescaling keeps.
enum class Norm : int { kNone = 0, kL1 = 1, kL2 = 2, kLinf = 3 };

// TiesRule of pymerge/rules/ties.py, as numbers.
struct Rule {
  Trim trim = Trim::kMagnitude;
  Elect elect = Elect::kSum;
  Merge merge = Merge::kWeightedMean;
  Rescale rescale = Rescale::kNone;  // kMultiply with a norm
  Norm norm = Norm::kNone;
  int zero_sign = 1;  // +1, -1, or 0: find the majority
  std::vector<double> weights, elect_weights, densities;
  std::vector<std::int64_t> ranks, dropped;
  double scaling = 1;
  std::uint64_t key = 0;
  std::optional<std::vector<double>> thresholds, bounds, factors;
  std::int64_t first = 0;
};

// One tensor.
struct Job {
  std::vector<Operand> models;
  std::optional<Operand> base;
  Operand out;
  std::int64_t n = 0;
  Rule rule;
};

struct Segment {
  std::vector<Operand> models;
  std::optional<Operand> base;
  std::int64_t n = 0;
};

// Device memory that `ties` or `select` needs beside its operands: at most 4 % of one input for a
// large tensor, and some 20 KB a model. Multiple of 256; the block passed in is aligned to 256.
std::size_t scratch_bytes(const std::vector<Job>& jobs);
std::size_t scratch_bytes(const std::vector<Segment>& segments, std::size_t models);

// 64-bit words of counts per tensor: kept[K], non_finite[K], thresholds[K] (bits of a double; NaN
// keeps none), conflicts, positive, negative, and 1 where a bracket missed and the exact passes
// ran. `ties` clears them first.
int stats_words(std::size_t models);

// Merges every job's tensor. All jobs have the same number of models; options may differ from job
// to job. stats: [jobs][stats_words].
void ties(const std::vector<Job>& jobs, void* scratch, std::size_t scratch_size,
          std::int64_t* stats, Place place);

// thresholds[k], in device memory: the ranks[k]-th largest magnitude of model k over all segments
// (T7); NaN for rank 0, 0 for a rank of all elements or more.
void select(const std::vector<Segment>& segments, const std::vector<std::int64_t>& ranks,
            void* scratch, std::size_t scratch_size, double* thresholds, Place place);

}  // namespace pymerge::cuda
