// Exact order statistics of |delta| over tensors too large to sort (docs/spec/ties.md, "select"): a
// sample gives a bracket, one pass counts what lies above it and collects what lies inside, the
// answer is an order statistic of the few collected. A bracket that missed, or held too much, is
// answered by two radix passes instead.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/core/scratch.h"
#include "cpu/ties/kernels.h"

namespace pymerge::cpu {

struct Context {
  const Kernels& kernels;
  int threads;
  Scratch& scratch;
};

// Writes the keys of elements i .. i + count - 1 of a tensor; dst has room for 16 more.
template <class K>
using KeySource = std::function<void(uint64_t i, uint64_t count, K* dst)>;

// One tensor of the base and of every model. derived: where the keys are not the magnitudes of task
// vectors, what makes them, the same for every model; `wide` in binary64. `models` then says what
// is read ahead, and is one buffer for all ranks, so that they share the keys.
struct Segment {
  const Buffer* models;
  Buffer base;
  uint64_t n;
  const KeySource<uint32_t>* derived = nullptr;
  const KeySource<uint64_t>* wide = nullptr;

  void keys(const Kernels& kernels, int model, uint64_t i, uint64_t count, uint32_t* dst) const {
    if (derived != nullptr) return (*derived)(i, count, dst);
    kernels.keys(models[model], base, i, count, dst);
  }
};

// The most that are sampled together: of 32 models the lists of 8M elements overflow.
inline constexpr int kSampledModels = 20;
inline constexpr uint32_t kInfinityKey = 0x7f800000u;
inline constexpr uint64_t kTask = uint64_t(1)
                                  << 17;  // elements a task: one contiguous stretch of every stream

// What a sample says of the rank-th largest key: it is `estimate`, and with overwhelming
// probability in [low, high), whose elements are collected. Heavy keys, of which there are too many
// for that, are counted alone: the bracket is one of them, [estimate, estimate + 1); or, with
// `atom`, one of them and what lies below it, [low, estimate), which is collected.
struct Bracket {
  uint32_t estimate = 0, low = 0, high = kInfinityKey + 1;
  uint32_t near_low = 0, near_high = 0;  // the part around the estimate where it is likeliest
  bool sampled = false;
  bool atom = false;
  // Where to look next, where counts say that the threshold is above or below [low, high).
  struct Side {
    uint32_t estimate = 0, low = 0, high = 0;
    bool atom = false;
  } above, below;

  bool collects() const { return high - low > 1; }
  // The elements equal to the estimate are counted, not collected.
  bool counts_estimate() const { return atom || !collects(); }
  uint32_t collected_high() const { return counts_estimate() ? estimate : high; }
  void move(bool higher) {
    const Side side = higher ? above : below;
    estimate = side.estimate;
    low = near_low = side.low;
    high = side.high;
    atom = side.atom;
    near_high = collected_high();
    above = below = Side();
  }
  bool can_move(bool higher) const { return (higher ? above : below).high != 0; }
  bool moves() const { return can_move(false) || can_move(true); }
  // For a pass that does not count the atom beside the rest: what lies below it is a side.
  void part_from_atom() {
    if (!atom) return;
    below = {low, low, estimate, false};
    low = estimate;
    atom = false;
  }
};

// Whether differences of the two have few distinct magnitudes, so that keys are heavy.
inline bool has_heavy_keys(const Buffer& model, const Buffer& base) {
  return size_of(model.type) == 2 && (base.data == nullptr || size_of(base.type) == 2);
}

inline uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// Joins what two parts of a tensor have: the sum, or the largest, with NaN above infinity.
inline void join(Norms norm, double& total, double part) {
  if (norm != Norms::kLargest) {
    total += part;
  } else if (!is_nan(total) && !(part <= total)) {
    total = part;
  }
}

// T9 of the elements that one segment's ranks keep, added up while they are selected.
struct KeptNorms {
  FusedArgs args;  // of all models, whose `lower` is set here
  std::vector<FusedModel> models;
  Norms norm;
  std::vector<double> totals;  // [models][2], over all elements and over those kept
  uint64_t additions = 0;      // that a term goes through at most
  bool known = true;           // else the selection needed more than a pass
};

// Samples models first .. first + count - 1 (at most kSampledModels) over the segments; brackets[j]
// is for ranks[j] of the `total` elements (one that is 0, or total or more, is skipped). stages:
// with several the brackets need not be narrow, since each stage narrows them. Uses the scratch and
// gives it back.
void sample_brackets(const Context&, const std::vector<Segment>&, int first, int count,
                     uint64_t total, const uint64_t* ranks, int stages, Bracket* brackets);

// The ranks[k]-th largest |delta_k| over the segments as if concatenated: NaN for rank 0 and for no
// elements, 0 for all of them. Work is float or double.
template <class Work>
std::vector<Work> select(const Context&, const std::vector<Segment>&,
                         const std::vector<uint64_t>& ranks);
// The same, and the norms of what they keep.
std::vector<float> select_with_norms(const Context&, const Segment&,
                                     const std::vector<uint64_t>& ranks, KeptNorms&);

}  // namespace pymerge::cpu
