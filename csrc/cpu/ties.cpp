#include "cpu/ties.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <limits>
#include <memory>

#include "common/philox.h"
#include "cpu/threads.h"

namespace pymerge::cpu {
namespace {

constexpr float kSmallest = 1.40129846432481707e-45f;  // the smallest magnitude that is not 0

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
  uint64_t key;
  std::vector<Work> weights, elect_weights, rescale_by;
  std::vector<Rescale> rescale;
  ElementRule<Work> rule;
};

// What one thread counts.
struct Counts {
  explicit Counts(int models) : kept(size_t(models)), non_finite(size_t(models)), high(size_t(models)) {}
  std::vector<uint64_t> kept, non_finite, high;
  uint64_t conflicts = 0, positive = 0, negative = 0, undecided = 0;

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
Plan<Work> make_plan(const std::vector<Buffer>& models, const Buffer& base, void* out, DType out_type, uint64_t n,
                     const TiesRule& rule) {
  Plan<Work> plan;
  const size_t count = models.size();
  plan.count = int(count);
  plan.models = models.data();
  plan.base = base;
  plan.out = out;
  plan.out_type = out_type;
  plan.n = n;
  plan.trim = rule.trim;
  plan.key = rule.key;
  plan.lower.assign(count, Work(0));
  plan.upper.assign(count, std::numeric_limits<Work>::infinity());
  plan.rescale.assign(count, Rescale::kNone);
  plan.rescale_by.assign(count, Work(1));
  Work total = 0;
  for (size_t k = 0; k < count; ++k) {
    plan.weights.push_back(Work(rule.weights[k]));
    plan.elect_weights.push_back(Work(rule.elect_weights[k]));
    plan.cutoff.push_back(random_cutoff(rule.densities[k]));
    total = total + plan.weights[k];
    const double density = rule.densities[k];
    if (rule.rescale == TiesRule::Norm::kDensity && density > 0 && density < 1) {
      plan.rescale[k] = Rescale::kDivide;
      plan.rescale_by[k] = Work(density);
    }
  }
  plan.rule = {rule.elect,
               rule.merge,
               rule.zero_majority && rule.majority < 0,
               base.data != nullptr,
               Work(rule.scaling),
               total,
               nullptr,
               nullptr,
               nullptr,
               nullptr};
  return plan;
}

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
      return philox_word(i, uint32_t(k), plan.key) < plan.cutoff[at];
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

// Elements begin .. end - 1 by the scalar rule. observe(k, delta, i) sees every task vector element.
template <class Work, class Observe>
void scalar_block(const Plan<Work>& plan, uint64_t begin, uint64_t end, Counts& counts, const Observe& observe) {
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

uint64_t tasks_of(uint64_t n) { return (n + kTask - 1) / kTask; }

Counts sum_of(const std::vector<std::unique_ptr<Counts>>& parts, int models) {
  Counts total(models);
  for (const auto& part : parts) {
    if (part) total.add(*part);
  }
  return total;
}

// --- apply: thresholds known ------------------------------------------------------------------------------------

Counts apply_scalar(const Context& ctx, Plan<double>& plan) {
  bind(plan);
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks_of(plan.n), [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    scalar_block(plan, task * kTask, std::min(plan.n, (task + 1) * kTask), *own, [](int, double, uint64_t) {});
  });
  return sum_of(counts, plan.count);
}

Counts apply_general(const Context& ctx, Plan<float>& plan) {
  const ElementRule<float>& rule = bind(plan);
  const GeneralArgs args{plan.models,       plan.count,        plan.base,          plan.out, plan.out_type, plan.trim,
                         plan.lower.data(), plan.upper.data(), plan.cutoff.data(), plan.key, rule};
  const unsigned block = std::clamp(32768u / unsigned(plan.count) & ~63u, 64u, 1024u);
  const size_t models = size_t(plan.count);
  bool scalar = false;
  for (size_t k = 0; k < models; ++k) scalar |= !is_finite(plan.rescale_by[k]);
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks_of(plan.n), [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    // Small enough to be kept by the allocator: 128 KB for the task vectors of one block, and a little.
    std::vector<float> floats(models * block + 4 * block + 64);
    std::vector<uint16_t> bits(models * (block / 16) + 3 * (block / 16));
    std::vector<uint32_t> words(block + 64);
    float* f = floats.data();
    uint16_t* b = bits.data() + models * (block / 16);
    const GeneralScratch scratch{block,
                                 f,
                                 f + block + 16,
                                 f + 2 * block + 16,
                                 f + 3 * block + 16,
                                 f + 4 * block + 16,
                                 bits.data(),
                                 b,
                                 b + block / 16,
                                 b + 2 * (block / 16),
                                 words.data()};
    GeneralCounts sums;
    sums.kept = own->kept.data();
    const uint64_t end = std::min(plan.n, (task + 1) * kTask);
    for (uint64_t i = task * kTask; i < end; i += block) {
      const unsigned size = unsigned(std::min<uint64_t>(block, end - i));
      if (scalar || !ctx.kernels.general(args, i, size, scratch, sums)) {
        scalar_block(plan, i, i + size, *own, [](int, float, uint64_t) {});
      }
    }
    own->conflicts += sums.conflicts;
    own->positive += sums.positive;
    own->negative += sums.negative;
    own->undecided += sums.undecided;
  });
  return sum_of(counts, plan.count);
}

// The fused loops' view of a plan, or none.
struct Fused {
  bool usable = false;
  DType type = DType::kFloat32;
  Weights weights = Weights::kUnit;
  FusedArgs args = {};
};

Fused fuse(const Plan<float>& plan) {
  Fused fused;
  if (plan.count > kFusedModels || (plan.trim != Trim::kMagnitude && plan.trim != Trim::kNone)) return fused;
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
  fused.args.zero_negative = plan.rule.zero_negative;
  fused.usable = true;
  return fused;
}

// -0 in fp32 and in bf16, for merges without a base: x - (-0) is x but for the sign of a zero, and -0 + y is y.
template <class T>
const void* minus_zeros() {
  static const std::vector<T> zeros = [] {
    T zero;
    if constexpr (sizeof(T) == 2) {
      zero = T{0x8000};
    } else {
      zero = T(-0.0f);
    }
    return std::vector<T>(kFusedBlock, zero);
  }();
  return zeros.data();
}

// Above this the output is written past the caches: 1.5 times on the copy of large tensors.
constexpr uint64_t kStreamBytes = uint64_t(1) << 20;

// Calls block(i, size, aligned) over a task's elements: whole groups from the first cache line boundary of `out` on,
// and what is before and behind them one short block each.
template <class Body>
void each_block(uint64_t task, uint64_t tasks, uint64_t head, uint64_t n, unsigned group, const Body& body) {
  uint64_t i = task == 0 ? 0 : head + task * kTask;
  const uint64_t end = task + 1 == tasks ? n : std::min(n, head + (task + 1) * kTask);
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

uint64_t elements_before_line(const void* p, uint64_t size) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const uint64_t bytes = (64 - address % 64) % 64;
  return bytes % size == 0 ? bytes / size : UINT64_MAX;
}

struct FusedRun {
  const Context& ctx;
  Plan<float>& plan;
  Fused& fused;
  FusedLoop loop;
  Compare compare;
};

// One pass of the fused loop. collect(thread, masks, i, size) sees the masks of each block that the loop merged,
// observe(thread, k, delta, i) the elements that the scalar rule merged.
template <class Collect, class Observe>
Counts run_fused(const FusedRun& run, const Collect& collect, const Observe& observe) {
  Plan<float>& plan = run.plan;
  bind(plan);
  const uint64_t bytes = size_of(run.fused.type);
  const unsigned group = bytes == 2 ? 32 : 16;
  const void* zeros = plan.base.data != nullptr ? nullptr
                      : bytes == 2              ? minus_zeros<BFloat16>()
                                                : minus_zeros<float>();
  FusedArgs common = run.fused.args;
  for (int k = 0; k < plan.count; ++k) {
    // Trimmed zeros change nothing but the count of what is kept, which is known where all is kept.
    const float lower = plan.trim == Trim::kNone ? 0.0f : plan.lower[size_t(k)];
    common.lower[k] = is_nan(lower) ? std::numeric_limits<float>::infinity() : std::max(lower, kSmallest);
  }
  uint64_t head = elements_before_line(plan.out, bytes);
  common.stream = head != UINT64_MAX && plan.n * bytes >= kStreamBytes;
  if (head == UINT64_MAX) head = 0;
  const uint64_t tasks = std::max<uint64_t>(1, tasks_of(plan.n > head ? plan.n - head : 1));
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(run.ctx.threads));
  parallel_for(run.ctx.threads, tasks, [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    FusedArgs args = common;
    alignas(64) FusedMasks masks;
    FusedCounts sums;
    each_block(task, tasks, head, plan.n, group, [&](uint64_t i, unsigned size, bool whole) {
      if (whole) {
        for (int k = 0; k < plan.count; ++k) args.model[k] = plan.models[k].at(i);
        args.base = zeros != nullptr ? zeros : plan.base.at(i);
        args.out = static_cast<char*>(plan.out) + i * bytes;
        if (run.loop(args, size, masks)) {
          run.ctx.kernels.fused_counts(masks, plan.count, size, run.fused.weights, run.compare, sums);
          collect(thread, masks, i, size);
          return;
        }
      }
      scalar_block(plan, i, i + size, *own, [&](int k, float delta, uint64_t at) { observe(thread, *own, k, delta, at); });
    });
    own->add(sums, plan.count);
  });
  Counts total = sum_of(counts, plan.count);
  for (int k = 0; k < plan.count; ++k) {
    if (plan.trim == Trim::kNone || plan.lower[size_t(k)] <= 0) total.kept[size_t(k)] = plan.n;
  }
  return total;
}

Counts apply(const Context& ctx, Plan<float>& plan) {
  Fused fused = fuse(plan);
  if (fused.usable) {
    const FusedLoop loop = ctx.kernels.fused(fused.type, plan.count, fused.weights, Compare::kThreshold);
    if (loop != nullptr) {
      return run_fused({ctx, plan, fused, loop, Compare::kThreshold}, [](int, const FusedMasks&, uint64_t, unsigned) {},
                       [](int, Counts&, int, float, uint64_t) {});
    }
  }
  return apply_general(ctx, plan);
}
Counts apply(const Context& ctx, Plan<double>& plan) { return apply_scalar(ctx, plan); }

// --- T9 -------------------------------------------------------------------------------------------------------------

// f_k of T3r for one model.
template <class Work>
void rescale_by_norm(const Context& ctx, Plan<Work>& plan, int k, TiesRule::Norm norm) {
  const uint64_t chunks = (plan.n + kNormChunk - 1) / kNormChunk;
  const bool largest = norm == TiesRule::Norm::kLinf;
  const bool squares = norm == TiesRule::Norm::kL2;
  // Chunks are added in order, a stretch of them at a time, so that memory is bounded.
  constexpr uint64_t kStretch = 1 << 14;
  std::vector<double> sums(2 * std::min(chunks, kStretch));
  double before = 0, after = 0;
  for (uint64_t first = 0; first < chunks; first += kStretch) {
    const uint64_t here = std::min(kStretch, chunks - first);
    parallel_for(ctx.threads, here, [&](int, uint64_t c) {
      const uint64_t begin = (first + c) * kNormChunk, end = std::min(plan.n, begin + kNormChunk);
      const unsigned size = unsigned(end - begin);
      double all[kRow] = {}, kept[kRow] = {};
      double most = 0, most_kept = 0;
      if (std::is_same_v<Work, float> && !largest) {
        std::vector<float> delta(kNormChunk + 16);
        std::vector<uint16_t> keep(kNormChunk / 16);
        ctx.kernels.deltas(plan.models[k], plan.base, begin, size, delta.data());
        const unsigned padded = (size + kRow - 1) / kRow * kRow;
        std::fill(delta.begin() + size, delta.begin() + long(padded), 0.0f);
        for (unsigned j = 0; j < size; ++j) {
          keep[j / 16] = uint16_t(keep[j / 16] | unsigned(keeps(plan, k, Work(delta[j]), begin + j)) << (j % 16));
        }
        ctx.kernels.norms(delta.data(), keep.data(), padded, squares, sums.data() + 2 * c);
        return;
      }
      for (unsigned j = 0; j < size; ++j) {
        const Work delta = delta_at(plan, k, base_at(plan, begin + j), begin + j);
        const double size_of_it = std::fabs(double(delta));
        const double x = squares ? size_of_it * size_of_it : size_of_it;
        const bool keep = keeps(plan, k, delta, begin + j);
        if (largest) {
          if (is_nan(x) || x > most) most = is_nan(most) ? most : x;
          if (keep && (is_nan(x) || x > most_kept)) most_kept = is_nan(most_kept) ? most_kept : x;
        } else {
          all[j % kRow] += x;
          kept[j % kRow] += keep ? x : 0.0;
        }
      }
      for (unsigned half = kRow / 2; half > 0; half /= 2) {
        for (unsigned l = 0; l < half; ++l) {
          all[l] += all[l + half];
          kept[l] += kept[l + half];
        }
      }
      sums[2 * c] = largest ? most : all[0];
      sums[2 * c + 1] = largest ? most_kept : kept[0];
    });
    for (uint64_t c = 0; c < here; ++c) {
      if (largest) {
        if (is_nan(sums[2 * c]) || sums[2 * c] > before) before = is_nan(before) ? before : sums[2 * c];
        if (is_nan(sums[2 * c + 1]) || sums[2 * c + 1] > after) after = is_nan(after) ? after : sums[2 * c + 1];
      } else {
        before += sums[2 * c];
        after += sums[2 * c + 1];
      }
    }
  }
  if (squares) {
    before = std::sqrt(before);
    after = std::sqrt(after);
  }
  if (!(before >= 1e-7 && after >= 1e-7)) return;
  plan.rescale[size_t(k)] = Rescale::kMultiply;
  plan.rescale_by[size_t(k)] = Work(before / after);
}

// --- all of it ---------------------------------------------------------------------------------------------------------

template <class Work>
void find_thresholds(const Context& ctx, Plan<Work>& plan, const TiesRule& rule, TiesStats& stats) {
  if (rule.trim != Trim::kMagnitude && rule.trim != Trim::kOutliers) return;
  const std::vector<Segment> segments = {{plan.models, plan.base, plan.n}};
  if (rule.thresholds) {
    for (size_t k = 0; k < plan.lower.size(); ++k) plan.lower[k] = Work((*rule.thresholds)[k]);
    stats.path = "known";
  } else {
    plan.lower = select<Work>(ctx, segments, rule.ranks);
    stats.path = "select";
  }
  if (rule.trim == Trim::kOutliers) {
    std::vector<uint64_t> ranks;
    for (const uint64_t dropped : rule.dropped) ranks.push_back(dropped > 0 && !rule.bounds ? dropped + 1 : 0);
    const std::vector<Work> bounds = select<Work>(ctx, segments, ranks);
    for (size_t k = 0; k < ranks.size(); ++k) {
      if (rule.dropped[k] > 0) plan.upper[k] = rule.bounds ? Work((*rule.bounds)[k]) : bounds[k];
    }
  }
}

template <class Work>
TiesStats run(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base, void* out, DType out_type,
              uint64_t n, const TiesRule& rule) {
  Plan<Work> plan = make_plan<Work>(models, base, out, out_type, n, rule);
  TiesStats stats;
  find_thresholds(ctx, plan, rule, stats);
  if (rule.rescale != TiesRule::Norm::kNone && rule.rescale != TiesRule::Norm::kDensity) {
    for (int k = 0; k < plan.count; ++k) {
      const double density = rule.densities[size_t(k)];
      if (density > 0 && density < 1) rescale_by_norm(ctx, plan, k, rule.rescale);
    }
  }
  Counts counts = apply(ctx, plan);
  const bool search = rule.zero_majority && rule.majority == 0 && rule.elect != Elect::kNone;
  if (search && counts.positive <= counts.negative && counts.undecided > 0) {  // T4: it elects - after all
    plan.rule.zero_negative = true;
    counts = apply(ctx, plan);
  }
  stats.kept = counts.kept;
  stats.non_finite = counts.non_finite;
  stats.conflicts = counts.conflicts;
  stats.positive = counts.positive;
  stats.negative = counts.negative;
  if (rule.trim == Trim::kMagnitude || rule.trim == Trim::kOutliers) {
    if (rule.thresholds) {
      stats.thresholds = *rule.thresholds;
    } else {
      for (const Work t : plan.lower) stats.thresholds.push_back(double(t));
    }
  }
  return stats;
}

}  // namespace

TiesStats ties(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base, void* out, DType out_type,
               uint64_t n, const TiesRule& rule) {
  FloatEnvironment environment;
  bool wide = out_type == DType::kFloat64 || (base.data != nullptr && base.type == DType::kFloat64);
  for (const Buffer& model : models) wide |= model.type == DType::kFloat64;
  if (wide) return run<double>(ctx, models, base, out, out_type, n, rule);
  return run<float>(ctx, models, base, out, out_type, n, rule);
}

void copy(const Kernels& kernels, const std::vector<uint64_t>& sources, uint64_t out, uint64_t bytes, int threads) {
  if (sources.empty() || sources.size() > 9) throw std::invalid_argument("copy takes 1 to 9 sources");
  if (out % 64 != 0) throw std::invalid_argument("copy writes whole cache lines: out must be a multiple of 64");
  constexpr uint64_t kBytes = kTask * 4;
  parallel_for(threads, (bytes + kBytes - 1) / kBytes, [&](int, uint64_t task) {
    const uint64_t begin = task * kBytes;
    const void* from[9];
    for (size_t k = 0; k < sources.size(); ++k) from[k] = reinterpret_cast<const void*>(sources[k] + begin);
    kernels.copy(from, int(sources.size()), reinterpret_cast<void*>(out + begin), std::min(kBytes, bytes - begin));
  });
}

}  // namespace pymerge::cpu
