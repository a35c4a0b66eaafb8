// The op `ties` on the CPU (docs/spec/ties.md): plan, select, apply, or all of it in one pass.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/ties/select.h"

namespace pymerge::cpu {

// The loops at the level that `pick_level` picks; std::invalid_argument as there.
const Kernels& kernels(const std::string& level);

// TiesRule of pymerge/rules/ties.py; the vectors have one entry a model.
struct TiesRule {
  Trim trim;
  Elect elect;
  Merge merge;
  bool zero_majority;
  enum class Norm : int { kNone = 0, kDensity = 1, kL1 = 2, kL2 = 3, kLinf = 4 } rescale;
  std::vector<double> weights, elect_weights, densities;
  std::vector<uint64_t> ranks, dropped;
  double scaling;
  uint64_t key;
  std::optional<std::vector<double>> thresholds, bounds;
  int majority;
  std::optional<std::vector<double>> factors;
  uint64_t first;
  std::vector<double> epsilons;
  uint64_t row_length, row_step;  // T3 magprune
};

// What a tensor that is merged in parts has to know of the whole of it: T3's thresholds, T3r's
// factors.
struct Precomputed {
  std::vector<double> thresholds, bounds, factors;
};

// TiesStats of pymerge/rules/ties.py.
struct TiesStats {
  std::vector<uint64_t> kept, non_finite;
  std::vector<double> thresholds;
  uint64_t conflicts = 0, positive = 0, negative = 0;
  const char* path =
      "";  // how the thresholds were found: "precomputed", "select", "one pass", "two passes"
};

// Merges n elements into `out` (dtype out_type), which overlaps no input. Neither thread count nor
// level changes a bit.
TiesStats ties(const Context&, const std::vector<Buffer>& models, const Buffer& base, void* out,
               DType out_type, uint64_t n, const TiesRule&);

// The inputs and `out_type` as in `ties`, which finds the same; nothing is written.
Precomputed precompute(const Context&, const std::vector<Buffer>& models, const Buffer& base,
                       DType out_type, uint64_t n, const TiesRule&);

// Reads the sources and writes `out`, each of `bytes` bytes, with the same loads, stores and tasks
// as a merge and no arithmetic to speak of: the bandwidth that merges are measured against. One
// source or more; `out` starts a cache line.
void copy(const Kernels&, const std::vector<uint64_t>& sources, uint64_t out, uint64_t bytes,
          int threads);

}  // namespace pymerge::cpu
