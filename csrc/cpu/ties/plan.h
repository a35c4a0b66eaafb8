// A merge with its options resolved to numbers, and the passes over all elements that `ties.cpp`
// and `sampled_threshold.cpp` are made of: by the scalar rule, and by the fused loops of kernels.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

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
  uint64_t key, first;  // T8
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
  void add(const FusedCounts& block, int models) {
    for (int k = 0; k < models; ++k) {
      kept[size_t(k)] += block.kept[k];
      high[size_t(k)] += block.high[k];
    }
    conflicts += block.conflicts;
    positive += block.positive;
    negative += block.negative;
    undecided += block.undecided;
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

// The fused loops' view of a plan, or none.
struct Fused {
  bool usable = false;
  DType type = DType::kFloat32;
  Weights weights = Weights::kUnit;
  FusedArgs args = {};
};

inline Fused fuse(const Plan<float>& plan) {
  Fused fused;
  if (plan.count > kFusedModels || (plan.trim != Trim::kMagnitude && plan.trim != Trim::kNone))
    return fused;
  if (plan.rule.elect == Elect::kCount || plan.rule.merge == Merge::kMax) return fused;
  fused.type = plan.out_type;
  if (plan.base.data != nullptr && plan.base.type != fused.type) return fused;
  bool units = true, both = true, ones = true;
  for (int k = 0; k < plan.count; ++k) {
    const size_t at = size_t(k);
    if (plan.models[k].type != fused.type || plan.rescale[at] != Rescale::kNone) return fused;
    units &= plan.weights[at] == 1;
    ones &= plan.elect_weights[at] == 1;
    both &= plan.weights[at] == plan.elect_weights[at];
    fused.args.weight[k] = plan.weights[at];
    fused.args.increment[k] = plan.rule.merge == Merge::kMean           ? 1.0f
                              : plan.rule.merge == Merge::kWeightedMean ? plan.weights[at]
                                                                        : 0.0f;
  }
  const bool divides = plan.rule.merge != Merge::kSum;
  if (plan.rule.elect == Elect::kNone) {
    // The loop takes the sign of an election value from the product w_k * delta_k.
    if (!both) {
      return fused;
    }
    fused.weights = Weights::kNoElection;
    if (plan.rule.merge == Merge::kWeightedMean) {  // T5: over all models
      for (float& increment : fused.args.increment) increment = 0;
      const float total = plan.rule.total_weight;
      fused.args.denominator = magnitude_of(total) < 1e-8f ? 1.0f : total;
    }
  } else if (units && ones && divides) {
    fused.weights = Weights::kUnit;
  } else if (both) {
    fused.weights = Weights::kBoth;
  } else if (ones) {
    fused.weights = Weights::kMerge;
  } else {
    return fused;
  }
  fused.args.scaling = plan.rule.scaling;
  fused.usable = true;
  return fused;
}

// -0 in fp32 and in bf16, for merges without a base: x - (-0) is x but for the sign of a zero, and
// -0 + y is y.
template <class T>
const void* minus_zeros() {
  // Never destroyed: calls may still run while the process exits.
  static const auto& zeros = *new std::vector<T>([] {
    T zero;
    if constexpr (sizeof(T) == 2) {
      zero = T{0x8000};
    } else {
      zero = T(-0.0f);
    }
    return std::vector<T>(kFusedBlock, zero);
  }());
  return zeros.data();
}

// Above this the output is written past the caches: 1.5 times on the copy of large tensors.
inline constexpr uint64_t kStreamBytes = uint64_t(1) << 20;

// Calls block(i, size, aligned) over a task's elements: whole groups from the first cache line
// boundary of `out` on, and what is before and behind them one short block each.
template <class Body>
void each_block(uint64_t task, uint64_t tasks, uint64_t elements, uint64_t head, uint64_t n,
                unsigned group, const Body& body) {
  uint64_t i = task == 0 ? 0 : head + task * elements;
  const uint64_t end = task + 1 == tasks ? n : std::min(n, head + (task + 1) * elements);
  if (task == 0 && head > 0) {
    body(uint64_t(0), unsigned(std::min(head, n)), false);
    i = head;
  }
  while (i < end) {
    const uint64_t left = end - i;
    if (left < group) {
      body(i, unsigned(left), false);
      return;
    }
    const unsigned size = unsigned(std::min<uint64_t>(left, kFusedBlock)) / group * group;
    body(i, size, true);
    i += size;
  }
}

inline uint64_t elements_before_line(const void* p, uint64_t size) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint64_t bytes = (64 - address % 64) % 64;
  return bytes % size == 0 ? bytes / size : UINT64_MAX;
}

inline const void* fused_zeros(uint64_t bytes) {
  return bytes == 2 ? minus_zeros<BFloat16>() : minus_zeros<float>();
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

struct FusedRun {
  const Context& ctx;
  Plan<float>& plan;
  Fused& fused;
  FusedLoop loop;
  Compare compare;
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
  const uint64_t bytes = size_of(run.fused.type);
  const unsigned group = bytes == 2 ? 32 : 16;
  const void* zeros = plan.base.data != nullptr ? nullptr : fused_zeros(bytes);
  FusedArgs common = run.fused.args;
  common.zero_negative = plan.rule.zero_negative ? 0xffff : 0;
  for (int k = 0; k < plan.count; ++k) {
    common.lower[k] = fused_lower(plan.trim == Trim::kNone ? 0.0f : plan.lower[size_t(k)]);
  }
  uint64_t head = elements_before_line(plan.out, bytes);
  common.stream = head != UINT64_MAX && plan.n * bytes >= kStreamBytes;
  if (head == UINT64_MAX) head = 0;
  const uint64_t tasks =
      std::max<uint64_t>(1, tasks_of(plan.n > head ? plan.n - head : 1, run.task));
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(run.ctx.threads));
  parallel_for(run.ctx.threads, tasks_in(run.part, tasks), [&](int thread, uint64_t number) {
    const uint64_t task = task_in(run.part, number);
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    FusedArgs args = common;
    alignas(64) FusedMasks masks;
    FusedCounts sums;
    each_block(task, tasks, run.task, head, plan.n, group,
               [&](uint64_t i, unsigned size, bool whole) {
                 own->elements += size;
                 if (whole) {
                   for (int k = 0; k < plan.count; ++k) args.model[k] = plan.models[k].at(i);
                   args.base = zeros != nullptr ? zeros : plan.base.at(i);
                   args.out = static_cast<char*>(plan.out) + i * bytes;
                   if (run.loop(args, size, masks)) {
                     run.ctx.kernels.fused_counts(masks, plan.count, size, run.fused.weights,
                                                  run.compare, plan.majority, sums);
                     collect(thread, args, masks, i, size);
                     return;
                   }
                 }
                 scalar_block(plan, i, i + size, *own, [&](int k, float delta, uint64_t at) {
                   observe(thread, *own, k, delta, at);
                 });
               });
    if (run.compare == Compare::kThreshold)
      std::copy(std::begin(sums.kept), std::end(sums.kept), std::begin(sums.high));
    own->add(sums, plan.count);
    for (int k = 0; run.kept_of_task != nullptr && k < plan.count; ++k)
      run.kept_of_task[number * uint64_t(plan.count) + uint64_t(k)] = uint32_t(sums.kept[k]);
  });
  Counts total = sum_of(counts, plan.count);
  for (int k = 0; k < plan.count; ++k) {
    if (plan.trim == Trim::kNone || plan.lower[size_t(k)] <= 0)
      total.kept[size_t(k)] = total.elements;
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
