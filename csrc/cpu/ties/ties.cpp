#include "cpu/ties/ties.h"

#include <cmath>
#include <stdexcept>
#include <type_traits>

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

Counts apply_scalar(const Context& ctx, Plan<double>& plan) {
  bind(plan);
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks_of(plan.n), [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    scalar_block(plan, task * kTask, std::min(plan.n, (task + 1) * kTask), *own,
                 [](int, double, uint64_t) {});
  });
  return sum_of(counts, plan.count);
}

Counts apply_general(const Context& ctx, Plan<float>& plan) {
  const ElementRule<float>& rule = bind(plan);
  const GeneralArgs args{plan.models,        plan.count, plan.base,         plan.out,
                         plan.out_type,      plan.trim,  plan.lower.data(), plan.upper.data(),
                         plan.cutoff.data(), plan.key,   plan.first,        rule};
  const unsigned block = std::clamp(32768u / unsigned(plan.count) & ~63u, 64u, 1024u);
  const size_t models = size_t(plan.count);
  bool scalar = false;
  for (size_t k = 0; k < models; ++k) scalar |= !is_finite(plan.rescale_by[k]);
  std::vector<std::unique_ptr<Counts>> counts(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks_of(plan.n), [&](int thread, uint64_t task) {
    auto& own = counts[size_t(thread)];
    if (!own) own = std::make_unique<Counts>(plan.count);
    // Small enough to be kept by the allocator: 128 KB for the task vectors of one block, and a
    // little.
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

Counts apply(const Context& ctx, Plan<float>& plan) {
  Fused fused = fuse(plan);
  if (fused.usable) {
    const FusedLoop loop = ctx.kernels.fused(fused.type, plan.count, fused.weights,
                                             Compare::kThreshold, plan.majority);
    if (loop != nullptr) {
      return run_fused(
          {ctx, plan, fused, loop, Compare::kThreshold},
          [](int, const FusedArgs&, const FusedMasks&, uint64_t, unsigned) {},
          [](int, Counts&, int, float, uint64_t) {});
    }
  }
  return apply_general(ctx, plan);
}
Counts apply(const Context& ctx, Plan<double>& plan) { return apply_scalar(ctx, plan); }

// --- T9 ------------------------------------------------------------------------------------------

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
          keep[j / 16] = uint16_t(keep[j / 16] | unsigned(keeps(plan, k, Work(delta[j]), begin + j))
                                                     << (j % 16));
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
        if (is_nan(sums[2 * c]) || sums[2 * c] > before)
          before = is_nan(before) ? before : sums[2 * c];
        if (is_nan(sums[2 * c + 1]) || sums[2 * c + 1] > after)
          after = is_nan(after) ? after : sums[2 * c + 1];
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
    for (const uint64_t dropped : rule.dropped)
      ranks.push_back(dropped > 0 && !rule.bounds ? dropped + 1 : 0);
    const std::vector<Work> bounds = select<Work>(ctx, segments, ranks);
    for (size_t k = 0; k < ranks.size(); ++k) {
      if (rule.dropped[k] == 0) continue;
      plan.upper[k] = rule.bounds          ? Work((*rule.bounds)[k])
                      : ranks[k] >= plan.n ? smallest_magnitude(plan, int(k))
                                           : bounds[k];
    }
  }
}

// Smaller tensors are selected from keys that stay in the caches, then merged. The heavy keys of
// 16-bit types make for quick brackets and slow selections. 2 cores, Sapphire Rapids class,
// 2026-11-22, K = 4: as fast either way at 0.2M elements of fp32 and 40,000 of bf16.
uint64_t sampled_from(DType type) { return uint64_t(1) << (size_of(type) == 2 ? 16 : 18); }

bool merge_in_one_pass(const Context& ctx, Plan<float>& plan, const TiesRule& rule,
                       TiesStats& stats, Counts& counts) {
  if (rule.trim != Trim::kMagnitude || rule.thresholds || plan.n < sampled_from(plan.out_type))
    return false;
  if (rule.rescale != TiesRule::Norm::kNone)
    return false;  // a norm of what is kept needs the thresholds first
  Fused fused = fuse(plan);
  if (!fused.usable) return false;
  SampledMerge result = merge_sampled(ctx, plan, fused, rule.ranks);
  if (!result.found) return false;
  stats.path = result.passes == 1 ? "one pass" : "two passes";
  counts = std::move(result.counts);
  return true;
}

// T3r by a norm: f_k for every model that is trimmed.
template <class Work>
void find_factors(const Context& ctx, Plan<Work>& plan, const TiesRule& rule) {
  if (rule.rescale == TiesRule::Norm::kNone || rule.rescale == TiesRule::Norm::kDensity) return;
  for (int k = 0; k < plan.count; ++k) {
    const double density = rule.densities[size_t(k)];
    if (!(density > 0 && density < 1)) continue;
    if (rule.factors) {
      plan.rescale[size_t(k)] = Rescale::kMultiply;
      plan.rescale_by[size_t(k)] = Work((*rule.factors)[size_t(k)]);
    } else {
      rescale_by_norm(ctx, plan, k, rule.rescale);
    }
  }
}

template <class Work>
Known find_known(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base,
                 DType out_type, uint64_t n, const TiesRule& rule) {
  Plan<Work> plan = make_plan<Work>(models, base, nullptr, out_type, n, rule);
  TiesStats unused;
  find_thresholds(ctx, plan, rule, unused);
  find_factors(ctx, plan, rule);
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
  bool merged = false;
  if constexpr (std::is_same_v<Work, float>)
    merged = merge_in_one_pass(ctx, plan, rule, stats, counts);
  if (!merged) find_thresholds(ctx, plan, rule, stats);
  find_factors(ctx, plan, rule);
  if (!merged) counts = apply(ctx, plan);
  const bool search = rule.zero_majority && rule.majority == 0 && rule.elect != Elect::kNone;
  if (search && counts.positive <= counts.negative &&
      counts.undecided > 0) {  // T4: it elects - after all
    plan.rule.zero_negative = true;
    counts = apply(ctx, plan);
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

Known known(const Context& ctx, const std::vector<Buffer>& models, const Buffer& base,
            DType out_type, uint64_t n, const TiesRule& rule) {
  FloatEnvironment environment;
  if (is_wide(models, base, out_type))
    return find_known<double>(ctx, models, base, out_type, n, rule);
  return find_known<float>(ctx, models, base, out_type, n, rule);
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
