#include "cpu/ties/ties.h"

#include <cmath>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "cpu/ties/magprune.h"
#include "cpu/ties/plan.h"

namespace pymerge::cpu {
namespace {

template <class Work>
Plan<Work> make_plan(const std::vector<Buffer>& models, const Buffer& base, void* out,
                     DType out_type, uint64_t n, const TiesRule& rule) {
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
  plan.first = rule.first;
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
  plan.majority = rule.zero_majority;
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

// --- apply: thresholds known ---------------------------------------------------------------------

template <class Work>
Counts apply_scalar(const Context& ctx, Plan<Work>& plan) {
  bind(plan);
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks_of(plan.n), [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    scalar_block(plan, task * kTask, std::min(plan.n, (task + 1) * kTask), *own,
                 [](int, Work, uint64_t) {});
  });
  return sum_of(counts, plan.count);
}

Counts apply(const Context& ctx, Plan<float>& plan) {
  // A kept zero times infinity is NaN, which the fused loop does not see.
  for (const float by : plan.rescale_by) {
    if (!is_finite(by)) return apply_scalar(ctx, plan);
  }
  Fused fused = fuse(plan);
  return run_fused(
      {ctx, plan, fused}, [](int, const FusedArgs&, const FusedMasks&, uint64_t, unsigned) {},
      [](int, Counts&, int, float, uint64_t) {});
}
Counts apply(const Context& ctx, Plan<double>& plan) { return apply_scalar(ctx, plan); }

// --- T9 ------------------------------------------------------------------------------------------

bool by_norm(TiesRule::Norm rescale) {
  return rescale != TiesRule::Norm::kNone && rescale != TiesRule::Norm::kDensity;
}
bool is_trimmed(double density) { return density > 0 && density < 1; }
Norms norm_of(TiesRule::Norm rescale) {
  return rescale == TiesRule::Norm::kL1   ? Norms::kSum
         : rescale == TiesRule::Norm::kL2 ? Norms::kSquares
                                          : Norms::kLargest;
}

// Runs body(own, begin, end) over stretches of `step` elements; `own` is the thread's, one of a
// vector of as many as threads.
template <class Own, class Body>
void each_stretch(const Context& ctx, uint64_t n, uint64_t step, std::vector<Own>& owned,
                  const Body& body) {
  parallel_for(ctx.threads, tasks_of(n, step), [&](int thread, uint64_t task) {
    body(owned[size_t(thread)], task * step, std::min(n, (task + 1) * step));
  });
}

// Joins sums, or the largest, of binary32 task vectors to totals[models][2], over all elements and
// over those kept, in one pass over the inputs. The order of threads is any.
void add_norms(const Context& ctx, Plan<float>& plan, Norms norm, std::vector<double>& totals) {
  const size_t models = size_t(plan.count);
  Fused fused = fuse(plan);
  for (size_t k = 0; k < models; ++k) fused.models[k].lower = plan.lower[k];
  fused.args.models = fused.models.data();
  const uint64_t stride = plan.n / 64 + 2;  // whole words are read, and one behind the last
  const bool room = models * stride * sizeof(uint64_t) <= ctx.scratch.left() - 64;
  uint64_t* drawn = nullptr;
  if (plan.trim == Trim::kRandom && plan.drawn == nullptr && room) {
    plan.drawn_stride = stride;
    plan.drawn = drawn = ctx.scratch.template take<uint64_t>(models * stride);
  }
  struct Own {
    std::vector<double> lanes, sums, totals;
  };
  std::vector<Own> owned(size_t(ctx.threads));
  each_stretch(ctx, plan.n, kNormCall, owned, [&](Own& own, uint64_t begin, uint64_t end) {
    own.lanes.resize(2 * kRow * models);
    own.sums.resize(2 * models);
    own.totals.resize(2 * models);
    ctx.kernels.norms(fused.args, begin, unsigned(end - begin), norm, drawn, plan.drawn_stride,
                      own.lanes.data(), own.sums.data());
    for (size_t row = 0; row < 2 * models; ++row) join(norm, own.totals[row], own.sums[row]);
  });
  for (const Own& own : owned) {
    for (size_t row = 0; row < own.totals.size(); ++row) join(norm, totals[row], own.totals[row]);
  }
}

// In binary64 only the largest are looked for: a sum that is rounded at each step rarely settles a
// quotient of the same precision.
void add_norms(const Context& ctx, Plan<double>& plan, Norms norm, std::vector<double>& totals) {
  if (norm != Norms::kLargest) return;
  std::vector<std::vector<double>> owned(size_t(ctx.threads), std::vector<double>(totals.size()));
  each_stretch(ctx, plan.n, kTask, owned, [&](auto& own, uint64_t begin, uint64_t end) {
    for (uint64_t i = begin; i < end; ++i) {
      const double base = base_at(plan, i);
      for (int k = 0; k < plan.count; ++k) {
        const double delta = delta_at(plan, k, base, i);
        join(norm, own[2 * size_t(k)], std::fabs(delta));
        if (keeps(plan, k, delta, i)) join(norm, own[2 * size_t(k) + 1], std::fabs(delta));
      }
    }
  });
  for (const auto& own : owned) {
    for (size_t row = 0; row < totals.size(); ++row) join(norm, totals[row], own[row]);
  }
}

// Adds what open[j] keeps, and all that it has, to sums[2 j + 1] and sums[2 j], exactly.
template <class Work>
void add_exactly(const Context& ctx, const Plan<Work>& plan, bool squares,
                 const std::vector<int>& open, std::vector<exact::Sum>& sums) {
  std::vector<std::vector<exact::Sum>> owned(size_t(ctx.threads));
  each_stretch(ctx, plan.n, kTask, owned, [&](auto& own, uint64_t begin, uint64_t end) {
    own.resize(sums.size());
    for (uint64_t i = begin; i < end; ++i) {
      const Work base = base_at(plan, i);
      for (size_t j = 0; j < open.size(); ++j) {
        const Work delta = delta_at(plan, open[j], base, i);
        own[2 * j].add(double(delta), squares);
        if (keeps(plan, open[j], delta, i)) own[2 * j + 1].add(double(delta), squares);
      }
    }
    for (exact::Sum& sum : own) sum.carry();
  });
  for (const auto& own : owned) {
    for (size_t j = 0; j < own.size(); ++j) sums[j].add(own[j]);
  }
}

// f_k of every model, 1 where it is not trimmed. `found`: the sums, where a selection has them.
template <class Work, class Each>
std::vector<Work> norm_factors(const Context& ctx, const Plan<Work>& plan, const TiesRule& rule,
                               const KeptNorms* found, const Each& each) {
  const Norms norm = norm_of(rule.rescale);
  const bool squares = norm == Norms::kSquares;
  const size_t models = size_t(plan.count);
  std::vector<double> totals(2 * models);
  if (found != nullptr) {
    totals = found->totals;
  } else {
    each([&](Plan<Work>& part) { add_norms(ctx, part, norm, totals); });
  }
  // Additions that a term goes through at most: in its lane, of lanes, calls, parts and threads.
  const double additions =
      double(kNormCall / kRow + 2 * tasks_of(plan.n, kNormCall) + uint64_t(ctx.threads) + 64 +
             (found != nullptr ? found->additions : 0));
  std::vector<Work> factors(models, Work(1));
  std::vector<int> open;
  for (size_t k = 0; k < models; ++k) {
    if (!is_trimmed(rule.densities[k])) continue;
    const double before = totals[2 * k], after = totals[2 * k + 1];
    if (norm == Norms::kLargest) {
      if (before >= exact::kLeastNorm && after >= exact::kLeastNorm)
        factors[k] = Work(before / after);
    } else if (std::is_same_v<Work, double> ||
               !exact::settles(before, after, additions * 0x1p-53, squares, &factors[k])) {
      open.push_back(int(k));
    }
  }
  if (open.empty()) return factors;
  std::vector<exact::Sum> sums(2 * open.size());
  each([&](Plan<Work>& part) { add_exactly(ctx, part, squares, open, sums); });
  for (size_t j = 0; j < open.size(); ++j)
    factors[size_t(open[j])] = exact::factor<Work>(sums[2 * j], sums[2 * j + 1], squares);
  return factors;
}

// --- all of it -----------------------------------------------------------------------------------

// The n-th largest: as a lower end it is 0, which keeps the same, and `select` does not look for
// it.
template <class Work>
Work smallest_magnitude(const Plan<Work>& plan, int k) {
  Work least = std::numeric_limits<Work>::infinity();
  for (uint64_t i = 0; i < plan.n; ++i) {
    const Work delta = delta_at(plan, k, base_at(plan, i), i);
    const Work size = is_nan(delta) ? Work(0) : magnitude_of(delta);  // N1
    least = size < least ? size : least;
  }
  return least;
}

// T3 `outliers`: both ends of the bands, in one pass over the inputs for four models at a time.
template <class Work>
void find_bands(const Context& ctx, Plan<Work>& plan, const TiesRule& rule, TiesStats& stats) {
  const size_t models = size_t(plan.count);
  std::vector<Buffer> twice;
  std::vector<uint64_t> ranks;
  for (size_t k = 0; k < models; ++k) {
    twice.insert(twice.end(), 2, plan.models[k]);
    const uint64_t dropped = rule.dropped[k];
    ranks.push_back(rule.thresholds ? 0 : rule.ranks[k]);
    ranks.push_back(dropped > 0 && !rule.bounds ? dropped + 1 : 0);
  }
  const std::vector<Segment> segments = {{twice.data(), plan.base, plan.n}};
  const std::vector<Work> found = select<Work>(ctx, segments, ranks);
  for (size_t k = 0; k < models; ++k) {
    plan.lower[k] = rule.thresholds ? Work((*rule.thresholds)[k]) : found[2 * k];
    if (rule.dropped[k] == 0) continue;
    plan.upper[k] = rule.bounds                  ? Work((*rule.bounds)[k])
                    : ranks[2 * k + 1] >= plan.n ? smallest_magnitude(plan, int(k))
                                                 : found[2 * k + 1];
  }
  stats.path = rule.thresholds ? "precomputed" : "select";
}

// Of binary32, magnitudes whose norms are wanted are added up while they are selected.
std::optional<KeptNorms> select_lower(const Context& ctx, Plan<float>& plan, const TiesRule& rule) {
  const Segment segment = {plan.models, plan.base, plan.n};
  if (!by_norm(rule.rescale) || rule.factors) {
    plan.lower = select<float>(ctx, {segment}, rule.ranks);
    return {};
  }
  Fused fused = fuse(plan);
  KeptNorms norms = {fused.args, std::move(fused.models), norm_of(rule.rescale),
                     std::vector<double>(2 * size_t(plan.count))};
  plan.lower = select_with_norms(ctx, segment, rule.ranks, norms);
  if (!norms.known) return {};
  return norms;
}
std::optional<KeptNorms> select_lower(const Context& ctx, Plan<double>& plan,
                                      const TiesRule& rule) {
  plan.lower = select<double>(ctx, {{plan.models, plan.base, plan.n}}, rule.ranks);
  return {};
}

// T3, and what T9 needs where the selection knows it.
template <class Work>
std::optional<KeptNorms> find_thresholds(const Context& ctx, Plan<Work>& plan, const TiesRule& rule,
                                         TiesStats& stats) {
  if (rule.trim == Trim::kOutliers) find_bands(ctx, plan, rule, stats);
  if (rule.trim != Trim::kMagnitude) return {};
  if (rule.thresholds) {
    for (size_t k = 0; k < plan.lower.size(); ++k) plan.lower[k] = Work((*rule.thresholds)[k]);
    stats.path = "precomputed";
    return {};
  }
  stats.path = "select";
  return select_lower(ctx, plan, rule);
}

// Smaller tensors are selected from keys that stay in the caches, then merged. The heavy keys of
// 16-bit types make for quick brackets and slow selections. 2 cores, Sapphire Rapids class,
// 2026-11-22, K = 4: as fast either way at 0.2M elements of fp32 and 40,000 of bf16.
uint64_t sampled_from(DType type) { return uint64_t(1) << (size_of(type) == 2 ? 16 : 18); }

bool merge_in_one_pass(const Context& ctx, Plan<float>& plan, const TiesRule& rule,
                       TiesStats& stats, Counts& counts) {
  if (rule.trim != Trim::kMagnitude || rule.thresholds || plan.n < sampled_from(plan.out_type))
    return false;
  if (by_norm(rule.rescale)) return false;  // a norm of what is kept needs the thresholds first
  if (plan.count > kSampledModels) return false;
  Fused fused = fuse(plan);
  SampledMerge result = merge_sampled(ctx, plan, fused, rule.ranks);
  if (!result.found) return false;
  stats.path = result.passes == 1 ? "one pass" : "two passes";
  counts = std::move(result.counts);
  return true;
}

// T3r by a norm: f_k for every model that is trimmed. each(body) calls body(part) for plans that
// are together all elements.
template <class Work, class Each>
void find_factors(const Context& ctx, Plan<Work>& plan, const TiesRule& rule,
                  const KeptNorms* found, const Each& each) {
  if (!by_norm(rule.rescale)) return;
  std::vector<Work> factors;
  if (rule.factors) {
    for (const double factor : *rule.factors) factors.push_back(Work(factor));
  } else {
    factors = norm_factors<Work>(ctx, plan, rule, found, each);
  }
  for (size_t k = 0; k < factors.size(); ++k) {
    if (factors[k] == 1 || !is_trimmed(rule.densities[k])) continue;
    plan.rescale[k] = Rescale::kMultiply;
    plan.rescale_by[k] = factors[k];
  }
}

template <class Work>
void find_factors(const Context& ctx, Plan<Work>& plan, const TiesRule& rule,
                  const KeptNorms* found) {
  find_factors(ctx, plan, rule, found, [&](const auto& body) { body(plan); });
}

// T3 `magprune`: a stretch of the tensor at a time, of which what is kept is drawn to bits that the
// loops of random trim take; a norm takes all stretches before the first is merged.
template <class Work>
class Magprune {
 public:
  Magprune(const Context& ctx, Plan<Work>& plan, const TiesRule& rule)
      : ctx_(ctx), plan_(plan), rule_(rule) {
    const uint64_t models = uint64_t(plan.count);
    plan.trim = Trim::kRandom;
    // At most half of the scratch, in whole calls of the norms' loop.
    const uint64_t most = kScratchBytes / 2 * 8 / models / kNormCall * kNormCall;
    stretch_ = std::max<uint64_t>(most, kNormCall);
    stride_ = std::min(stretch_, plan.n) / 64 + 2;
    bits_ = ctx.scratch.template take<uint64_t>(models * stride_);
  }

  void find_factors() {
    pymerge::cpu::find_factors(ctx_, plan_, rule_, nullptr, [&](const auto& body) { each(body); });
  }

  Counts merge() {
    Counts counts(plan_.count);
    each([&](Plan<Work>& part) { counts.add(apply(ctx_, part)); });
    return counts;
  }

 private:
  template <class Body>
  void each(const Body& body) {
    for (uint64_t begin = 0; begin < plan_.n; begin += stretch_) {
      const uint64_t end = std::min(plan_.n, begin + stretch_);
      if (drawn_ != begin) {
        draw_magprune(ctx_, plan_, {rule_.row_length, rule_.row_step}, rule_.densities,
                      rule_.epsilons, begin, end, bits_, stride_);
        drawn_ = begin;
      }
      Plan<Work> part = plan_;
      std::vector<Buffer> models;
      for (int k = 0; k < plan_.count; ++k)
        models.push_back({plan_.models[k].at(begin), plan_.models[k].type});
      part.models = models.data();
      if (part.base.data != nullptr) part.base.data = part.base.at(begin);
      if (part.out != nullptr)
        part.out = static_cast<char*>(part.out) + begin * size_of(part.out_type);
      part.n = end - begin;
      part.drawn = bits_;
      part.drawn_stride = stride_;
      body(part);
    }
  }

  const Context& ctx_;
  Plan<Work>& plan_;
  const TiesRule& rule_;
  uint64_t stretch_, stride_, drawn_ = UINT64_MAX;
  uint64_t* bits_;
};

template <class Work>
Precomputed find_precomputed(const Context& ctx, const std::vector<Buffer>& models,
                             const Buffer& base, DType out_type, uint64_t n, const TiesRule& rule) {
  Plan<Work> plan = make_plan<Work>(models, base, nullptr, out_type, n, rule);
  TiesStats unused;
  if (rule.trim == Trim::kMagprune) {
    Magprune<Work>(ctx, plan, rule).find_factors();
  } else {
    const std::optional<KeptNorms> norms = find_thresholds(ctx, plan, rule, unused);
    find_factors(ctx, plan, rule, norms ? &*norms : nullptr);
  }
  return {{plan.lower.begin(), plan.lower.end()},
          {plan.upper.begin(), plan.upper.end()},
          {plan.rescale_by.begin(), plan.rescale_by.end()}};
}

template <class Work>
TiesStats run(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base, void* out,
              DType out_type, uint64_t n, const TiesRule& rule) {
  Plan<Work> plan = make_plan<Work>(models, base, out, out_type, n, rule);
  TiesStats stats;
  Counts counts(plan.count);
  std::optional<Magprune<Work>> magprune;
  if (rule.trim == Trim::kMagprune) {
    magprune.emplace(ctx, plan, rule);
    magprune->find_factors();
    counts = magprune->merge();
  } else {
    bool merged = false;
    if constexpr (std::is_same_v<Work, float>)
      merged = merge_in_one_pass(ctx, plan, rule, stats, counts);
    std::optional<KeptNorms> norms;
    if (!merged) norms = find_thresholds(ctx, plan, rule, stats);
    find_factors(ctx, plan, rule, norms ? &*norms : nullptr);
    if (!merged) counts = apply(ctx, plan);
  }
  const bool search = rule.zero_majority && rule.majority == 0 && rule.elect != Elect::kNone;
  if (search && counts.positive <= counts.negative &&
      counts.undecided > 0) {  // T4: it elects - after all
    plan.rule.zero_negative = true;
    counts = magprune ? magprune->merge() : apply(ctx, plan);
  }
  stats.kept = counts.kept;
  stats.non_finite = counts.non_finite;
  stats.conflicts = counts.conflicts;
  if (rule.zero_majority) {
    stats.positive = counts.positive;
    stats.negative = counts.negative;
  }
  if (rule.trim == Trim::kMagnitude || rule.trim == Trim::kOutliers) {
    if (rule.thresholds) {
      stats.thresholds = *rule.thresholds;
    } else {
      for (const Work t : plan.lower) stats.thresholds.push_back(double(t));
    }
  }
  return stats;
}

bool is_wide(const std::vector<Buffer>& models, const Buffer& base, DType out_type) {
  bool wide = out_type == DType::kFloat64 || (base.data != nullptr && base.type == DType::kFloat64);
  for (const Buffer& model : models) wide |= model.type == DType::kFloat64;
  return wide;
}

}  // namespace

Precomputed precompute(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base,
                       DType out_type, uint64_t n, const TiesRule& rule) {
  FloatEnvironment environment;
  if (is_wide(models, base, out_type))
    return find_precomputed<double>(ctx, models, base, out_type, n, rule);
  return find_precomputed<float>(ctx, models, base, out_type, n, rule);
}

TiesStats ties(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base, void* out,
               DType out_type, uint64_t n, const TiesRule& rule) {
  FloatEnvironment environment;
  if (is_wide(models, base, out_type))
    return run<double>(ctx, models, base, out, out_type, n, rule);
  return run<float>(ctx, models, base, out, out_type, n, rule);
}

void copy(const Kernels& kernels, const std::vector<uint64_t>& sources, uint64_t out,
          uint64_t bytes, int threads) {
  if (sources.empty()) throw std::invalid_argument("copy takes one source or more");
  if (out % 64 != 0)
    throw std::invalid_argument("copy writes whole cache lines: out must be a multiple of 64");
  constexpr uint64_t kBytes = kTask * 4;
  parallel_for(threads, (bytes + kBytes - 1) / kBytes, [&](int, uint64_t task) {
    const uint64_t begin = task * kBytes;
    std::vector<const void*> from;
    for (const uint64_t source : sources)
      from.push_back(reinterpret_cast<const void*>(source + begin));
    kernels.copy(from.data(), int(sources.size()), reinterpret_cast<void*>(out + begin),
                 std::min(kBytes, bytes - begin));
  });
}

}  // namespace pymerge::cpu
