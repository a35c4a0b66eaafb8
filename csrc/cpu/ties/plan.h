// A merge with its options resolved to numbers, and the passes over all elements that `ties.cpp`
// and `sampled_threshold.cpp` are made of: by the scalar rule, and by the fused loops of kernels.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/exact_sum.h"
#include "common/philox.h"
#include "cpu/core/threads.h"
#include "cpu/ties/select.h"

namespace pymerge::cpu {

inline constexpr float kSmallest =
    1.40129846432481707e-45f;  // the smallest magnitude that is not 0

// A merge with every threshold a number, in the working precision.
template <class Work>
struct Plan {
  int count;
  const Buffer* models;
  Buffer base;
  void* out;
  DType out_type;
  uint64_t n;
  Trim trim;
  std::vector<Work> lower, upper;  // T3; a NaN lower keeps none
  std::vector<uint64_t> cutoff;
  uint64_t key, first;              // T8
  const uint64_t* drawn = nullptr;  // [models][drawn_stride]: what is kept, see FusedModel
  uint64_t drawn_stride = 0;
  std::vector<Work> weights, elect_weights, rescale_by;
  std::vector<Rescale> rescale;
  bool majority = false;  // T4: the signs of S are counted
  ElementRule<Work> rule;
};

// What one thread counts.
struct Counts {
  explicit Counts(int models)
      : kept(size_t(models)), non_finite(size_t(models)), high(size_t(models)) {}
  std::vector<uint64_t> kept, non_finite, high;
  uint64_t conflicts = 0, positive = 0, negative = 0, undecided = 0;
  uint64_t elements = 0;  // counted by run_fused

  void add(const Counts& other) {
    for (size_t k = 0; k < kept.size(); ++k) {
      kept[k] += other.kept[k];
      non_finite[k] += other.non_finite[k];
      high[k] += other.high[k];
    }
    conflicts += other.conflicts;
    positive += other.positive;
    negative += other.negative;
    undecided += other.undecided;
    elements += other.elements;
  }
};

template <class Work>
const ElementRule<Work>& bind(Plan<Work>& plan) {  // to the vectors where they now are
  plan.rule.weights = plan.weights.data();
  plan.rule.elect_weights = plan.elect_weights.data();
  plan.rule.rescale = plan.rescale.data();
  plan.rule.rescale_by = plan.rescale_by.data();
  return plan.rule;
}

template <class Work>
bool keeps(const Plan<Work>& plan, int k, Work delta, uint64_t i) {  // T3
  const size_t at = size_t(k);
  switch (plan.trim) {
    case Trim::kNone:
      return true;
    case Trim::kRandom:
      if (plan.drawn != nullptr) return plan.drawn[at * plan.drawn_stride + i / 64] >> i % 64 & 1;
      return philox_word(plan.first + i, uint32_t(k), plan.key) < plan.cutoff[at];
    default: {
      const Work size = is_nan(delta) ? Work(0) : magnitude_of(delta);  // N1
      return size >= plan.lower[at] && size <= plan.upper[at];
    }
  }
}

template <class Work>
Work base_at(const Plan<Work>& plan, uint64_t i) {
  return plan.base.data == nullptr ? Work(0) : load<Work>(plan.base.type, plan.base.data, i);
}

template <class Work>
Work delta_at(const Plan<Work>& plan, int k, Work base, uint64_t i) {  // T1
  const Work x = load<Work>(plan.models[k].type, plan.models[k].data, i);
  return plan.base.data == nullptr ? x : x - base;
}

// Elements begin .. end - 1 by the scalar rule. observe(k, delta, i) sees every task vector
// element.
template <class Work, class Observe>
void scalar_block(const Plan<Work>& plan, uint64_t begin, uint64_t end, Counts& counts,
                  const Observe& observe) {
  const int count = plan.count;
  std::vector<Work> delta(static_cast<size_t>(count));
  std::vector<char> keep(static_cast<size_t>(count));
  for (uint64_t i = begin; i < end; ++i) {
    const Work base = base_at(plan, i);
    for (int k = 0; k < count; ++k) {
      const size_t at = size_t(k);
      delta[at] = delta_at(plan, k, base, i);
      keep[at] = keeps(plan, k, delta[at], i);
      counts.kept[at] += uint64_t(keep[at]);
      counts.non_finite[at] += !is_finite(delta[at]);  // N3
      observe(k, delta[at], i);
    }
    const Element<Work> element = evaluate<Work>(
        plan.rule, count, base, [&](int k) { return delta[size_t(k)]; },
        [&](int k) { return keep[size_t(k)] != 0; });
    store<Work>(plan.out_type, plan.out, i, element.value);
    counts.conflicts += element.conflict;
    counts.positive += element.balance > 0;
    counts.negative += element.balance < 0;
    counts.undecided += element.undecided;
  }
}

inline uint64_t tasks_of(uint64_t n, uint64_t task = kTask) { return (n + task - 1) / task; }

inline Counts sum_of(const std::vector<std::unique_ptr<Counts>>& parts, int models) {
  Counts total(models);
  for (const auto& part : parts) {
    if (part) total.add(*part);
  }
  return total;
}

// The fused loops' view of a plan. Thresholds are filled in by run_fused.
struct Fused {
  std::vector<FusedModel> models;
  FusedArgs args = {};
};

inline Fused fuse(const Plan<float>& plan) {
  Fused fused;
  FusedArgs& args = fused.args;
  bool ones = true, weights = true;
  args.unit = true;
  bool same = plan.base.data == nullptr || plan.base.type == plan.out_type;
  for (int k = 0; k < plan.count; ++k) {
    const size_t at = size_t(k);
    FusedModel model = {};
    model.x = plan.models[k];
    model.upper = plan.upper[at];
    model.high = model.low = quiet_nan<float>();
    model.weight = plan.weights[at];
    model.vote = plan.elect_weights[at];
    model.rescale = plan.rescale[at];
    model.rescale_by = plan.rescale_by[at];
    model.cutoff = plan.cutoff[at];
    model.bits = plan.drawn == nullptr ? nullptr : plan.drawn + at * plan.drawn_stride;
    fused.models.push_back(model);
    ones &= model.vote == 1;
    weights &= model.vote == model.weight;
    args.unit &= model.weight == 1;
    args.rescales |= model.rescale != Rescale::kNone;
    same &= model.x.type == plan.out_type;
  }
  if (same && plan.out_type == DType::kFloat32) args.types = Types::kFloats;
  if (same && plan.out_type == DType::kBFloat16 && plan.trim != Trim::kRandom)
    args.types = Types::kPairs;
  args.count = plan.count;
  args.base = plan.base;
  args.out = plan.out;
  args.out_type = plan.out_type;
  args.trim = plan.trim;
  args.compare = Compare::kThreshold;
  args.votes = ones ? Votes::kOnes : weights ? Votes::kWeights : Votes::kOwn;
  args.elect = plan.rule.elect;
  args.merge = plan.rule.merge;
  args.majority = plan.majority && args.elect != Elect::kNone;
  if (args.elect == Elect::kNone && args.merge == Merge::kWeightedMean) {  // T5: over all models
    const float total = plan.rule.total_weight;
    args.denominator = magnitude_of(total) < 1e-8f ? 1.0f : total;
  }
  args.scaling = plan.rule.scaling;
  args.key = plan.key;
  args.first = plan.first;
  return fused;
}

// Elements a call of the fused loop, so that masks and what is carried from one of its halves to
// the other stay in the L1 cache.
inline unsigned fused_block(int models) {
  return std::clamp(8 * kFusedBlock / unsigned(models) / kTile * kTile, kTile, kFusedBlock);
}

// Masks and values of one thread.
class FusedRoom {
 public:
  explicit FusedRoom(int models) {
    const unsigned words = fused_block(models) / 16;
    const size_t rows = (size_t(models) * words + 31) / 32 * 32;  // of whole cache lines
    const size_t values = size_t(models) * kTile;
    memory_.reset(new Line[(values * 4 + (3 * rows + 3 * size_t(kFusedBlock / 16)) * 2) / 64]);
    float* floats = reinterpret_cast<float*>(memory_.get());
    uint16_t* bits = reinterpret_cast<uint16_t*>(floats + values);
    masks.words = words;
    masks.values = floats;
    masks.keep = bits;
    masks.high = bits + rows;
    masks.low = bits + 2 * rows;
    masks.conflict = bits + 3 * rows;
    masks.positive = masks.conflict + kFusedBlock / 16;
    masks.negative = masks.positive + kFusedBlock / 16;
  }
  FusedMasks masks;

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::unique_ptr<Line[]> memory_;
};

// Runs the loop on fewer than kTile elements: on copies that are padded, whose masks end where the
// elements do.
class ShortBlock {
 public:
  explicit ShortBlock(const Fused& fused)
      : models_(fused.models),
        bits_(2 * fused.models.size()),
        bytes_(4 * kTile * (fused.models.size() + 2)) {}

  bool run(const Kernels& kernels, const FusedArgs& args, uint64_t i, unsigned size,
           const FusedMasks& masks) {
    std::fill(bytes_.begin(), bytes_.end(), char(0));
    char* at = bytes_.data();
    const auto padded = [&](const Buffer& x) {
      std::memcpy(at, x.at(i), size * size_of(x.type));
      at += 4 * kTile;
      return Buffer{at - 4 * kTile, x.type};
    };
    for (int k = 0; k < args.count; ++k) {
      FusedModel& model = models_[size_t(k)];
      model = args.models[k];
      model.x = padded(model.x);
      if (model.bits == nullptr) continue;
      uint64_t* own_bits = bits_.data() + 2 * k;
      const uint64_t* from = model.bits + i / 64;
      *own_bits = i % 64 == 0 ? *from : *from >> i % 64 | from[1] << (64 - i % 64);
      model.bits = own_bits;
    }
    own = args;
    own.models = models_.data();
    if (args.base.data != nullptr) own.base = padded(args.base);
    own.out = at;
    own.stream = false;
    if (own.types == Types::kPairs) own.types = Types::kAny;
    own.first = args.first + i;
    if (!kernels.fused(own, 0, kTile, masks)) return false;
    const uint64_t bytes = size_of(args.out_type);
    std::memcpy(static_cast<char*>(args.out) + i * bytes, at, size * bytes);
    const auto cut = [&](uint16_t* words) {
      for (unsigned w = 0; w < kTile / 16; ++w) {
        const unsigned left = size > 16 * w ? std::min(16u, size - 16 * w) : 0;
        words[w] = uint16_t(words[w] & ((1u << left) - 1));
      }
    };
    for (uint16_t* rows : {masks.keep, masks.high, masks.low}) {
      for (int k = 0; k < args.count; ++k) cut(rows + size_t(k) * masks.words);
    }
    // What is behind the elements is zeros, which vote for nothing.
    return true;
  }
  FusedArgs own;  // those that the masks are of

 private:
  std::vector<FusedModel> models_;
  std::vector<uint64_t> bits_;
  std::vector<char> bytes_;
};

// Above this the output is written past the caches: 1.5 times on the copy of large tensors.
inline constexpr uint64_t kStreamBytes = uint64_t(1) << 20;

// Calls body(i, size, whole) over a task's elements: blocks of whole tiles from the first cache
// line boundary of `out` on, and what is before and behind them one short block each.
template <class Body>
void each_block(uint64_t task, uint64_t tasks, uint64_t elements, uint64_t head, uint64_t n,
                unsigned block, const Body& body) {
  uint64_t i = task == 0 ? 0 : head + task * elements;
  const uint64_t end = task + 1 == tasks ? n : std::min(n, head + (task + 1) * elements);
  if (task == 0 && head > 0) {
    body(uint64_t(0), unsigned(std::min(head, n)), false);
    i = head;
  }
  while (i < end) {
    const uint64_t left = end - i;
    if (left < kTile) {
      body(i, unsigned(left), false);
      return;
    }
    const unsigned size = unsigned(std::min<uint64_t>(left, block)) / kTile * kTile;
    body(i, size, true);
    i += size;
  }
}

inline uint64_t elements_before_line(const void* p, uint64_t size) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint64_t bytes = (64 - address % 64) % 64;
  return bytes % size == 0 ? bytes / size : UINT64_MAX;
}

// A threshold as the fused loops take it. Trimmed zeros change nothing but the count of what is
// kept, which is known where all is kept.
inline float fused_lower(float lower) {
  return is_nan(lower) ? std::numeric_limits<float>::infinity() : std::max(lower, kSmallest);
}

// Some of the tasks of a pass over the elements: of each 32, those whose bit is set.
using Part = unsigned;
inline constexpr uint64_t kOfTasks = 32;
inline constexpr Part kAllTasks = 0xffffffff;
inline uint64_t tasks_in(Part part, uint64_t tasks) {
  const Part rest = part & ((1u << tasks % kOfTasks) - 1);
  return tasks / kOfTasks * uint64_t(__builtin_popcount(part)) + uint64_t(__builtin_popcount(rest));
}
inline uint64_t task_in(Part part, uint64_t j) {
  const uint64_t each = uint64_t(__builtin_popcount(part));
  for (uint64_t left = j % each; left > 0; --left) part &= part - 1;
  return j / each * kOfTasks + uint64_t(__builtin_ctz(part));
}

inline float fused_lower(Trim trim, float lower) {
  return trim == Trim::kNone ? kSmallest : trim == Trim::kMagnitude ? fused_lower(lower) : lower;
}

struct FusedRun {
  const Context& ctx;
  Plan<float>& plan;
  Fused& fused;
  Part part = kAllTasks;
  uint32_t* kept_of_task = nullptr;  // [tasks_in][models], what the loop kept
  uint64_t task = kTask;             // elements
};

// One pass of the fused loop. collect(thread, args, masks, i, size) sees the masks of each block
// that the loop merged, observe(thread, k, delta, i) the elements that the scalar rule merged.
template <class Collect, class Observe>
Counts run_fused(const FusedRun& run, const Collect& collect, const Observe& observe) {
  Plan<float>& plan = run.plan;
  bind(plan);
  Fused& fused = run.fused;
  FusedArgs& args = fused.args;
  const uint64_t bytes = size_of(plan.out_type);
  args.models = fused.models.data();
  args.zero_negative = plan.rule.zero_negative ? 0xffff : 0;
  for (int k = 0; k < plan.count; ++k)
    fused.models[size_t(k)].lower = fused_lower(plan.trim, plan.lower[size_t(k)]);
  uint64_t head = elements_before_line(plan.out, bytes);
  args.stream = head != UINT64_MAX && plan.n * bytes >= kStreamBytes;
  if (head == UINT64_MAX) head = 0;
  const uint64_t tasks =
      std::max<uint64_t>(1, tasks_of(plan.n > head ? plan.n - head : 1, run.task));
  const size_t models = size_t(plan.count);
  struct Own {
    Own(const Fused& fused)
        : counts(fused.args.count), room(fused.args.count), rest(fused), sums(fused.args.count) {}
    Counts counts;
    FusedRoom room;
    ShortBlock rest;
    Counts sums;  // of one task
  };
  std::vector<std::unique_ptr<Own>> owned(static_cast<size_t>(run.ctx.threads));
  parallel_for(run.ctx.threads, tasks_in(run.part, tasks), [&](int thread, uint64_t number) {
    const uint64_t task = task_in(run.part, number);
    auto& own = owned[size_t(thread)];
    if (!own) own = std::make_unique<Own>(fused);
    const FusedMasks& masks = own->room.masks;
    own->sums = Counts(plan.count);
    FusedCounts sums{own->sums.kept.data(), own->sums.high.data()};
    each_block(task, tasks, run.task, head, plan.n, fused_block(plan.count),
               [&](uint64_t i, unsigned size, bool whole) {
                 own->counts.elements += size;
                 if (size == 0) return;
                 const bool done = whole ? run.ctx.kernels.fused(args, i, size, masks)
                                         : own->rest.run(run.ctx.kernels, args, i, size, masks);
                 if (done) {
                   const FusedArgs& its = whole ? args : own->rest.own;
                   run.ctx.kernels.fused_counts(its, whole ? size : kTile, masks, sums);
                   collect(thread, its, masks, i, whole ? size : kTile);
                   return;
                 }
                 scalar_block(plan, i, i + size, own->counts, [&](int k, float delta, uint64_t at) {
                   observe(thread, own->counts, k, delta, at);
                 });
               });
    if (args.compare == Compare::kThreshold) own->sums.high = own->sums.kept;
    own->sums.conflicts = sums.conflicts;
    own->sums.positive = sums.positive;
    own->sums.negative = sums.negative;
    own->sums.undecided = sums.undecided;
    own->counts.add(own->sums);
    for (size_t k = 0; run.kept_of_task != nullptr && k < models; ++k)
      run.kept_of_task[number * models + k] = uint32_t(own->sums.kept[k]);
  });
  Counts total(plan.count);
  for (const auto& own : owned) {
    if (own) total.add(own->counts);
  }
  for (size_t k = 0; k < models; ++k) {  // zeros pass as trimmed
    const bool all = plan.trim == Trim::kMagnitude && plan.lower[k] <= 0;
    if (all || plan.trim == Trim::kNone) total.kept[k] = total.elements;
  }
  return total;
}

// One pass over all elements in which the rank-th largest |delta_k| is found and the merge written,
// for every model k with 0 < ranks[k] < n; the other models' lower thresholds are known. Fills
// plan.lower. See sampled_threshold.cpp.
struct SampledMerge {
  bool found =
      false;  // else plan.lower is to be found by other means, and all is to be merged again
  int passes = 0;
  Counts counts;
};
SampledMerge merge_sampled(const Context&, Plan<float>& plan, Fused& fused,
                           const std::vector<uint64_t>& ranks);

}  // namespace pymerge::cpu
