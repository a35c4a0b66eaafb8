// Sampled thresholds: the merge is written while the thresholds that it depends on are still being
// found.
//
// A sample gives each model an estimate of its threshold and a bracket around it. One pass over the
// inputs merges by the estimates, counts what lies above each bracket, and collects (key, position)
// of what lies inside: a few elements in a thousand. The counts prove that the threshold is inside,
// the collected keys say what it is, and only the elements between it and the estimate, a tenth of
// the collected, are merged again. Where keys are heavy (bf16 task vectors have few distinct
// values) one of them is the estimate t and is not collected: the two counts c(> t) < r <= c(>= t)
// prove it, and what lies below it is collected where that is little.
//
// Large tensors go in three or four stages. The first, over an eighth of the tasks or less, is a
// sample a hundred times larger than the other: it narrows the brackets of the second, which then
// collects and fixes up little, and all before it those of the next. Where it says that another
// bracket is the likelier, the others go by that, and its own elements are merged again. Proof and
// result are of all stages. What they disprove is answered by a second pass.
//
// A band (T3 `outliers`) has two thresholds, which are found in the same way: its upper end is the
// lower one of mirrored keys. Thresholds are numbered as FusedArgs::bounds says.
//
// Bytes moved: the K + 1 inputs once, the output once; 8 bytes written and read for each collected
// element, and K + 1 values for the part of them around the estimate, so that fixing up rarely goes
// back to the inputs, where it would touch K + 1 pages for each element.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

#include "cpu/ties/order.h"
#include "cpu/ties/plan.h"

namespace pymerge::cpu {
namespace {

constexpr unsigned kFixUpBatch = 256;
// So many candidates are collected at a time, or more: with fewer, branches are mispredicted; of
// many more the inputs have left the L2 cache. Sapphire Rapids class, 2026-11-22, n = 16M, K = 4,
// fp32: the whole op takes 26 to 27 % of the copy's time more than with known thresholds where each
// block is collected on its own, 25 to 26 % with 32 or 64, 29 to 32 % with 160.
constexpr unsigned kBatch = 32;
static_assert(kBatch + kFusedBlock < kPendingRoom);
constexpr uint64_t kMostStages = 5;  // one of them for elements that are merged again
constexpr double kSigmas = 3.5;      // half the width of a refined bracket, in standard deviations
constexpr double kNearSigmas = 1.5;  // the likelier part of it

// One threshold that is looked for.
struct BoundState {
  bool open = false;     // the threshold is not known yet
  bool collect = false;  // elements inside the bracket are collected
  bool lost = false;     // the bracket missed, and there is no other
  size_t since = 0;      // the first stage that went by this bracket, or a wider one
  Bracket bracket;
};

int bounds_of(const Plan<float>& plan) {
  return plan.trim == Trim::kOutliers ? 2 * plan.count : plan.count;
}
int model_of(const Plan<float>& plan, int bound) {
  return bound < plan.count ? bound : bound - plan.count;
}
uint32_t bound_key(const Plan<float>& plan, int bound, float delta) {
  return bound < plan.count ? key_of(delta) : mirrored_key(key_of(delta));
}
// The threshold that a key is, and the other way round.
float end_of(const Plan<float>& plan, int bound, uint32_t key) {
  return bits_float(bound < plan.count ? key : mirrored_key(key));
}
void set_end(Plan<float>& plan, int bound, float end) {
  (bound < plan.count ? plan.lower[size_t(bound)] : plan.upper[size_t(bound - plan.count)]) = end;
}
std::vector<uint32_t> keys_of_ends(const Plan<float>& plan) {
  std::vector<uint32_t> keys;
  for (const float lower : plan.lower) keys.push_back(float_bits(lower));
  if (plan.trim == Trim::kOutliers) {
    for (const float upper : plan.upper) keys.push_back(mirrored_key(float_bits(upper)));
  }
  return keys;
}

// Collected elements of one bound, found by one thread.
struct List : Collected {
  std::unique_ptr<uint32_t[]> own_pending;
  char padding[64];
};

// Room for the elements that one stage collects: for so many with values, and twice as many others.
struct Lists {
  Lists(const Context& ctx, int models, const std::vector<BoundState>& states, uint64_t near)
      : bounds(int(states.size())), threads(ctx.threads), capacity(2 * near) {
    lists.resize(size_t(threads) * states.size());
    for (size_t at = 0; at < lists.size(); ++at) {
      const BoundState& state = states[at % states.size()];
      if (!state.collect) continue;
      List& list = lists[at];
      list.keys = ctx.scratch.take<uint32_t>(capacity + near);  // and `picked` of FixUp::run
      list.positions = ctx.scratch.take<uint32_t>(capacity);
      list.near_keys = ctx.scratch.take<uint32_t>(near);
      list.records = ctx.scratch.take<uint32_t>(near * uint64_t(models + 2));
      list.capacity = capacity;
      list.near_capacity = near;
      list.near_low = state.bracket.near_low;
      list.near_span = state.bracket.near_high - state.bracket.near_low;
      list.below_estimate = state.bracket.atom;
      list.models = models;
      list.own_pending.reset(new uint32_t[kPendingRoom]);
      list.pending = list.own_pending.get();
    }
  }
  // The `near`, of all stages together, for which their lists fit, and twice the keys of as many
  // bounds as are resolved at a time.
  static uint64_t room(const Context& ctx, int models, const std::vector<BoundState>& states) {
    const uint64_t threads = uint64_t(ctx.threads);
    uint64_t all = 0;
    for (const BoundState& state : states)
      all += threads * uint64_t(state.collect || (state.open && state.bracket.moves()));
    if (all == 0) return 0;
    const uint64_t each =
        4 * (2 * 2 + 1 + 3 + uint64_t(models));  // bytes a record, with two of the others
    const uint64_t joined = 2 * 4 * 3 * threads * std::min<uint64_t>(threads, states.size());
    const uint64_t lines = 64 * 4 * kMostStages * all + 8192;  // what their arrays begin on
    return (ctx.scratch.left() - lines) / (each * all + joined) / 16 * 16;
  }
  List& at(int thread, int bound) { return lists[size_t(thread) * size_t(bounds) + size_t(bound)]; }

  void push(int thread, int bound, uint32_t key, uint32_t position) {
    List& list = at(thread, bound);
    if (list.count == capacity) {
      list.overflow = true;
      return;
    }
    list.keys[list.count] = key;
    list.positions[list.count++] = position;
  }

  // The keys of one bound, put together at dst; false where a list had no room left.
  bool join(int bound, uint32_t* dst, uint64_t& count) const {
    count = 0;
    for (int thread = 0; thread < threads; ++thread) {
      const List& list = lists[size_t(thread) * size_t(bounds) + size_t(bound)];
      if (list.overflow) return false;
      dst = std::copy(list.keys, list.keys + list.count, dst);
      dst = std::copy(list.near_keys, list.near_keys + list.near_count, dst);
      count += list.count + list.near_count;
    }
    return true;
  }

  int bounds, threads;
  uint64_t capacity;
  std::vector<List> lists;
};

// Merges elements again, by the new thresholds, a batch at a time through the fused loop.
class FixUp {
 public:
  FixUp(const Context& ctx, const Plan<float>& plan, const Fused& fused,
        const std::vector<uint32_t>& estimates, Counts& counts)
      : ctx_(ctx),
        plan_(plan),
        estimates_(estimates),
        ends_(keys_of_ends(plan)),
        counts_(counts),
        models_(fused.models),
        args_(known(fused.args)),
        room_(args_) {
    for (int k = 0; k <= plan.count; ++k) {
      const Buffer staged{staged_[k], DType::kFloat32};
      (k < plan.count ? models_[size_t(k)].x : args_.base) = staged;
    }
    args_.models = models_.data();
    args_.out = staged_[plan.count + 1];
    args_.types = args_.out_type == DType::kFloat32 ? Types::kFloats : Types::kAny;
    args_.stream = false;
    for (size_t bound = 0; bound < ends_.size(); ++bound) {
      from_[bound] = std::min(estimates[bound], ends_[bound]);
      span_[bound] = std::max(estimates[bound], ends_[bound]) - from_[bound];
    }
  }

  // What the new threshold keeps and the estimate did not, or the other way round, of one list. An
  // element that several bounds collected belongs to the first whose decision changed.
  void run(int bound, List& list) {
    constexpr uint64_t kAhead = 32;
    const int models = plan_.count;
    // The likely ones, from the values kept with them.
    const uint64_t size = uint64_t(models) + 2;
    uint64_t found = 0;
    uint32_t* picked = list.keys + list.count;  // room for their numbers is there: see Lists
    for (uint64_t j = 0; j < list.near_count; ++j) {
      picked[found] = uint32_t(j);
      found += list.near_keys[j] - from_[bound] < span_[bound];
    }
    for (uint64_t j = 0; j < found; ++j) {
      if (j + 2 * kAhead < found) __builtin_prefetch(list.records + picked[j + 2 * kAhead] * size);
      if (j + kAhead < found) prefetch_out(list.records[picked[j + kAhead] * size]);
      const uint32_t* record = list.records + picked[j] * size;
      const uint32_t* values = record + 1;
      const float base = bits_float(values[models]);
      if (!owned(bound, [&](int k) { return bits_float(values[k]) - base; })) continue;
      for (int k = 0; k <= models; ++k) staged_[k][filled_] = bits_float(values[k]);
      add(record[0]);
    }
    // The others, from the inputs.
    found = 0;
    for (uint64_t j = 0; j < list.count; ++j) {
      list.positions[found] = list.positions[j];
      found += list.keys[j] - from_[bound] < span_[bound];
    }
    for (uint64_t j = 0; j < found; ++j) {
      if (j + kAhead < found) {
        const uint64_t ahead = list.positions[j + kAhead];
        for (int k = 0; k < models; ++k) __builtin_prefetch(plan_.models[k].at(ahead));
        if (plan_.base.data != nullptr) __builtin_prefetch(plan_.base.at(ahead));
        prefetch_out(ahead);
      }
      const uint64_t i = list.positions[j];
      const float base = base_at(plan_, i);
      if (!owned(bound, [&](int k) { return delta_at(plan_, k, base, i); })) continue;
      for (int k = 0; k < models; ++k) {
        const Buffer& x = plan_.models[k];
        staged_[k][filled_] = load<float>(x.type, x.data, i);
      }
      staged_[models][filled_] = plan_.base.data != nullptr ? base : -0.0f;
      add(uint32_t(i));
    }
  }

  // Merges what is staged.
  void flush() {
    if (filled_ == 0) return;
    const size_t bytes = size_of(plan_.out_type);
    const unsigned padded = (filled_ + kTile - 1) / kTile * kTile;
    const int models = plan_.count;
    args_.zero_negative = plan_.rule.zero_negative ? 0xffff : 0;
    for (int k = 0; k <= models; ++k)  // zeros behind the elements are not kept
      std::fill(staged_[k] + filled_, staged_[k] + padded, 0.0f);
    Counts models_counts(models);
    FusedCounts was{models_counts.kept.data(), models_counts.high.data()}, is = was;
    bool finite = true;
    const unsigned block = fused_block(args_);
    for (const bool now : {false, true}) {
      const std::vector<uint32_t>& ends = now ? ends_ : estimates_;
      for (int k = 0; k < models; ++k) {
        models_[size_t(k)].lower = fused_lower(plan_.trim, lower_of(ends, k));
        models_[size_t(k)].upper = upper_of(ends, k);
      }
      for (unsigned i = 0; i < padded; i += block) {
        const unsigned size = std::min(block, padded - i);
        finite &= ctx_.kernels.fused(args_, i, size, room_.masks);
        ctx_.kernels.fused_counts(args_, size, room_.masks, now ? is : was);
      }
    }
    if (finite) {
      char* out = static_cast<char*>(plan_.out);
      const char* merged = reinterpret_cast<const char*>(staged_[models + 1]);
      for (unsigned j = 0; j < filled_; ++j)
        memcpy(out + bytes * positions_[j], merged + bytes * j, bytes);
      counts_.conflicts += is.conflicts - was.conflicts;
      counts_.positive += is.positive - was.positive;
      counts_.negative += is.negative - was.negative;
      counts_.undecided += is.undecided - was.undecided;
    } else {
      for (unsigned j = 0; j < filled_; ++j) by_the_scalar_rule(positions_[j]);
    }
    filled_ = 0;
  }

 private:
  static FusedArgs known(FusedArgs args) {
    args.compare = Compare::kThreshold;
    return args;
  }

  template <class Delta>  // of a model
  bool owned(int bound, const Delta& delta) const {
    bool first = true;
    for (int b = 0; b < bound; ++b)
      first &= bound_key(plan_, b, delta(model_of(plan_, b))) - from_[b] >= span_[b];
    return first;
  }

  float lower_of(const std::vector<uint32_t>& ends, int k) const {
    return bits_float(ends[size_t(k)]);
  }
  float upper_of(const std::vector<uint32_t>& ends, int k) const {
    if (plan_.trim != Trim::kOutliers) return plan_.upper[size_t(k)];
    return end_of(plan_, plan_.count + k, ends[size_t(plan_.count + k)]);
  }

  void prefetch_out(uint64_t i) const {
    __builtin_prefetch(static_cast<const char*>(plan_.out) + i * size_of(plan_.out_type), 1);
  }

  void add(uint32_t position) {
    positions_[filled_++] = position;
    if (filled_ == kFixUpBatch) flush();
  }

  void by_the_scalar_rule(uint64_t i) {
    const float base = base_at(plan_, i);
    float delta[kSampledModels], size[kSampledModels];
    for (int k = 0; k < plan_.count; ++k) {
      delta[k] = delta_at(plan_, k, base, i);
      size[k] = bits_float(key_of(delta[k]));
    }
    const auto merged_by = [&](const std::vector<uint32_t>& ends) {
      return evaluate<float>(
          plan_.rule, plan_.count, base, [&](int k) { return delta[k]; },
          [&](int k) { return size[k] >= lower_of(ends, k) && size[k] <= upper_of(ends, k); });
    };
    const Element<float> was = merged_by(estimates_), is = merged_by(ends_);
    store<float>(plan_.out_type, plan_.out, i, is.value);
    counts_.conflicts += uint64_t(is.conflict) - uint64_t(was.conflict);
    counts_.positive += uint64_t(is.balance > 0) - uint64_t(was.balance > 0);
    counts_.negative += uint64_t(is.balance < 0) - uint64_t(was.balance < 0);
    counts_.undecided += uint64_t(is.undecided) - uint64_t(was.undecided);
  }

  const Context& ctx_;
  const Plan<float>& plan_;
  const std::vector<uint32_t>& estimates_;
  const std::vector<uint32_t> ends_;  // the thresholds' keys
  Counts& counts_;
  uint32_t from_[kSampledBounds], span_[kSampledBounds];  // keys whose decision changed
  unsigned filled_ = 0;
  uint32_t positions_[kFixUpBatch];
  alignas(64) float staged_[kSampledModels + 2][kFixUpBatch];  // models, base, output
  std::vector<FusedModel> models_;
  FusedArgs args_;
  FusedRoom room_;
};

// A part of the tasks, merged by the estimates of the time.
struct Stage {
  Stage(const Context& ctx, int models, const std::vector<BoundState>& states, uint64_t near)
      : lists(ctx, models, states, near), counts(models) {
    for (const BoundState& state : states) {
      counted.push_back(state.bracket.counts_estimate());
      collected.push_back(state.collect);
    }
  }
  Lists lists;
  std::vector<char> counted;        // for each bound, whether its bracket counted the estimate
  std::vector<char> collected;      // and whether elements were collected
  std::vector<uint32_t> estimates;  // keys
  Counts counts;
  std::vector<uint32_t> kept;  // [tasks][bounds]
};
using Stages = std::vector<std::unique_ptr<Stage>>;

// What stages counted and collected of one bound.
struct Found {
  bool whole = true;    // false where a list had no room
  uint64_t inside = 0;  // collected keys in the bracket, put together
  uint64_t above = 0;   // elements above what is collected
  uint64_t over = 0;    // where the bracket counts its estimate, those above that
  uint64_t last() const { return above + inside; }
};

// The brackets of earlier stages hold that of later ones.
Found join(const Kernels& kernels, const Stages& stages, int bound, const BoundState& state,
           uint32_t* dst) {
  const Bracket& bracket = state.bracket;
  const bool counted = bracket.counts_estimate();
  const uint32_t end = bracket.collected_high();
  Found found;
  for (size_t j = state.since; j < stages.size(); ++j) {
    const Stage& stage = *stages[j];
    const uint64_t high = stage.counts.high[size_t(bound)];
    const uint64_t above = stage.counted[size_t(bound)] ? stage.counts.kept[size_t(bound)] : high;
    const bool same = stage.estimates[size_t(bound)] == bracket.estimate;
    found.above += above;
    found.over += stage.counted[size_t(bound)] && same ? high : above;
    if (!stage.collected[size_t(bound)]) continue;
    uint64_t more = 0;
    found.whole &= stage.lists.join(bound, dst + found.inside, more);
    if (!found.whole) return found;
    if (counted) {  // those of a bracket that did not count it
      kernels.count(dst + found.inside, more, bracket.estimate, bracket.estimate + 1, &found.over);
    }
    found.inside += kernels.partition(dst + found.inside, more, bracket.low, end,
                                      dst + found.inside, &found.above);
  }
  return found;
}

void run_stage(const Context& ctx, Plan<float>& plan, Fused& fused,
               const std::vector<BoundState>& states, Part part, uint64_t task, Stage& stage) {
  const int bounds = int(states.size());
  // Where the threshold is the atom at 0, what is kept is what lies above it: nothing else need be
  // compared, unless it is one end of a band.
  Compare compare = plan.trim == Trim::kOutliers ? Compare::kHigh : Compare::kThreshold;
  for (int bound = 0; bound < bounds; ++bound) {
    const BoundState& state = states[size_t(bound)];
    const Bracket& bracket = state.bracket;
    const float never = quiet_nan<float>();
    if (state.open) set_end(plan, bound, end_of(plan, bound, bracket.estimate));
    FusedModel& model = fused.models[size_t(model_of(plan, bound))];
    const bool lower = bound < plan.count;
    (lower ? model.high : model.upper_high) =
        state.open ? end_of(plan, bound, bracket.high) : never;
    (lower ? model.low : model.upper_low) =
        state.open && state.collect ? end_of(plan, bound, bracket.low) : never;
    if (state.open && state.bracket.high > 1 && compare == Compare::kThreshold)
      compare = Compare::kHigh;
    if (state.open && state.collect) compare = Compare::kBracket;
  }
  fused.args.compare = compare;
  fused.args.models = fused.models.data();
  Lists& lists = stage.lists;
  const auto collect = [&](int thread, const FusedArgs& args, const FusedMasks& masks, uint64_t i,
                           unsigned size) {
    for (int bound = 0; bound < bounds; ++bound) {
      if (!states[size_t(bound)].collect) continue;
      List& list = lists.at(thread, bound);
      ctx.kernels.candidates(args, masks, bound, size, uint32_t(i), list);
      if (list.pending_count >= kBatch) ctx.kernels.collect(fused.args, bound, list);
    }
  };
  const auto observe = [&](int thread, Counts& own, int k, float delta, uint64_t i) {
    for (int bound = k; bound < bounds; bound += plan.count) {
      const BoundState& state = states[size_t(bound)];
      if (!state.open) continue;
      const uint32_t key = bound_key(plan, bound, delta);
      own.high[size_t(bound)] += key >= state.bracket.high;
      if (state.collect && key >= state.bracket.low && key < state.bracket.collected_high())
        lists.push(thread, bound, key, uint32_t(i));
    }
  };
  stage.estimates = keys_of_ends(plan);
  stage.kept.resize(tasks_in(part, tasks_of(plan.n, task)) * size_t(bounds));
  stage.counts = run_fused({ctx, plan, fused, part, stage.kept.data(), task}, collect, observe);
  for (int thread = 0; thread < ctx.threads; ++thread) {
    for (int bound = 0; bound < bounds; ++bound) {
      if (!states[size_t(bound)].collect) continue;
      ctx.kernels.collect(fused.args, bound, lists.at(thread, bound));
    }
  }
}

// What stages over some of the tasks say of a threshold: it is about the `target`-th
// largest key of their elements, with a standard deviation of `sigma` keys.
struct Prediction {
  Prediction(const Stages& stages, int bound, size_t since, uint64_t rank, uint64_t n) {
    uint64_t elements = 0, tasks = 0, steps = 0;
    double squares = 0;  // successive differences, so that the tensor's structure counts
    for (size_t at = since; at < stages.size(); ++at) {
      const Stage& stage = *stages[at];
      elements += stage.counts.elements;
      // Without the last one, which may be short.
      const size_t size = stage.kept.size() / stage.counts.kept.size(), whole = size - 1;
      const uint32_t* kept = stage.kept.data() + bound;
      const size_t stride = stage.counts.kept.size();
      for (size_t j = 1; j < whole; ++j) {
        const double step = double(kept[j * stride]) - double(kept[(j - 1) * stride]);
        squares += step * step;
      }
      tasks += whole;
      steps += whole - 1;
    }
    // The number above the threshold in all T tasks, predicted from that in t: the variance of one
    // task's is squares / 2 / steps, that of the error T (T / t - 1) times it.
    share = double(elements) / double(n);
    target = share * double(rank);
    const double all = double(tasks) / share;
    sigma = share * std::sqrt(all * (1 / share - 1) * squares / 2 / double(steps));
    sigma *= 1 + 3 / double(tasks);  // it is an estimate itself
  }
  double share, target, sigma;
};

// Whether stages say that the threshold is on another side of the bracket, which is then moved
// there, once. What they merged is to be merged again, which costs their share of a pass: the more,
// the surer they must be.
bool reconsider(BoundState& state, const Found& found, const Prediction& its, size_t stages) {
  if (!found.whole || state.since > 0) return false;
  const double margin = its.share * its.sigma;
  const bool counted = state.bracket.counts_estimate();
  const bool higher = its.target + margin < double(counted ? found.over : found.above);
  const bool lower = its.target - margin > double(found.last());
  if (!(higher || lower) || !state.bracket.can_move(higher)) return false;
  const Bracket was = state.bracket;
  state.bracket.move(higher);
  (higher ? state.bracket.below : state.bracket.above) = {was.estimate, was.low, was.high,
                                                          was.atom};
  state.collect = state.bracket.collects();
  state.since = stages;
  return true;
}

// So many of the elements that have been seen may be inside a bracket, so that there is room for as
// large a share of the next stage, and of each that is to come.
struct Limits {
  double next, all;
};

// Narrows a bracket by what stages counted and collected. Leaves it where it is not sure. Where
// more are still inside than there is room for, which are heavy keys, the estimate is counted
// instead: distinct keys grow fewer from stage to stage and need room in the next one alone.
// joined: the collected keys; spare: room for as many.
void refine(const Kernels& kernels, BoundState& state, const Found& found, const Prediction& its,
            const Limits& limits, const uint32_t* joined, uint32_t* spare) {
  Bracket& bracket = state.bracket;
  if (!found.whole || !state.collect) return;
  const double above = double(found.above), last = double(found.last()), target = its.target;
  const double reach = kSigmas * its.sigma + 4, close = kNearSigmas * its.sigma + 2;
  if (target > last || (!bracket.atom && target < above + 1)) return;
  const uint32_t end = bracket.collected_high();
  const Order order(kernels, joined, found.inside, bracket.low, end, spare);
  const auto nth = [&](double of) { return order.nth(uint64_t(of - above)); };
  const auto over = [&](double by) {  // an edge that is not to be seen stays
    return target - by < above + 1 ? end : nth(target - by) + 1;
  };
  const auto under = [&](double by) {
    if (target + by + 1 > last) return bracket.low;
    return target + by < above ? end : nth(target + by + 1);
  };
  Bracket narrow = bracket;
  narrow.low = under(reach);
  if (narrow.low != bracket.low) narrow.below = Bracket::Side();  // it would skip some
  narrow.near_low = under(close);
  narrow.near_high = over(close);
  const bool below_atom = bracket.atom && target - reach > above;
  narrow.atom = bracket.atom && !below_atom;
  if (!narrow.atom) {
    narrow.high = over(reach);
    if (narrow.high != bracket.high) narrow.above = Bracket::Side();
    narrow.estimate = nth(std::ceil(target));
    if (below_atom) narrow.above = {bracket.estimate, bracket.low, bracket.high, true};
  }
  // Distinct keys fill a bracket to twice the reach; an eighth more says that there are heavy ones.
  const double most = std::max(limits.all, std::min(limits.next, 2.25 * reach));
  const auto light = [&](uint32_t from, uint32_t to) {
    uint64_t over = 0;
    return double(kernels.count(joined, found.inside, from, to, &over)) <= most;
  };
  if (narrow.atom || !light(narrow.low, narrow.high)) {
    const uint32_t atom = narrow.estimate;
    uint64_t greater = 0;
    const uint64_t equal = kernels.count(joined, found.inside, atom, atom + 1, &greater);
    const auto side = [&](uint64_t rank, uint32_t from, uint32_t to) {
      if (rank == 0 || rank > found.inside) return Bracket::Side();
      const uint32_t key = order.nth(rank);
      return light(from, to) ? Bracket::Side{key, from, to, false}
                             : Bracket::Side{key, key, key + 1, false};
    };
    if (narrow.high > atom + 1) narrow.above = side(greater, atom + 1, narrow.high);
    narrow.high = atom + 1;
    narrow.atom = narrow.low < atom && light(narrow.low, atom);
    if (!narrow.atom) {
      const uint32_t from = narrow.low < atom ? narrow.low : bracket.low;
      narrow.below = from < atom ? side(greater + equal + 1, from, atom) : narrow.below;
      narrow.low = atom;
    }
  }
  bracket = narrow;
  state.collect = bracket.collects();
}

// How a pass is cut: into tasks, several of the first stage for each thread, and into stages, each
// with its places among 32 tasks: 1, 3, 12 and 16 of them; 4, 12 and 16 where the tasks would be
// too small for that; or all at once.
struct Staging {
  Staging(uint64_t n, int threads) {
    constexpr uint64_t kFourStages = 256, kThreeStages = 32;  // tasks for each thread, at least
    constexpr uint64_t kLeastOfFour = uint64_t(1) << 14, kLeastOfThree = uint64_t(1) << 12;
    const uint64_t most = n / uint64_t(std::max(2, threads));  // elements for each thread
    if (most >= kFourStages * kLeastOfFour) {
      while (most < kFourStages * task) task /= 2;
      parts = {0x00008000, 0x80800080, 0x2a2a2a2a, 0x55555555};
    } else if (most >= kThreeStages * kLeastOfThree) {
      while (most < kThreeStages * task) task /= 2;
      parts = {0x08080808, 0xa2a2a2a2, 0x55555555};
    } else {
      task = kLeastOfThree;
    }
  }
  uint64_t task = kTask;
  std::vector<Part> parts = {kAllTasks};
};

// One pass by the estimates. True where every threshold is known afterwards, and everything merged
// by it; the states of the bounds that the counts disproved stay open. Large tensors go in stages:
// what some of the tasks say of the thresholds makes the brackets of the rest narrow, and few of
// its elements are left to fix up.
bool pass(const Context& ctx, Plan<float>& plan, Fused& fused, const std::vector<uint64_t>& ranks,
          std::vector<BoundState>& states, const Staging& staging, Counts& counts) {
  const size_t mark = ctx.scratch.mark();
  const int count = int(states.size());  // bounds
  const uint64_t task = staging.task;
  // Without stages where nothing is to be learned from them.
  bool learns = false, moves = false;
  for (const BoundState& state : states) {
    learns |= state.collect;
    moves |= state.open && state.bracket.moves();
  }
  const std::vector<Part> parts = learns || moves ? staging.parts : std::vector<Part>{kAllTasks};
  const int workers = std::min(ctx.threads, count);
  const uint64_t near = Lists::room(ctx, plan.count, states);
  const uint64_t room = 3 * near * uint64_t(ctx.threads) + 32;  // keys
  const std::vector<BoundState> before = states;
  uint32_t* joined_keys = nullptr;
  const auto joined_of = [&](int worker) { return joined_keys + 2 * room * uint64_t(worker); };
  Stages stages;
  size_t stale = 0;  // so many stages are merged again
  // For those, where there may be some: of 16-bit types stages find heavy keys that a sample did
  // not.
  bool narrow = false;
  for (int k = 0; k < plan.count; ++k) narrow |= has_heavy_keys(plan.models[k], plan.base);
  const uint64_t reserved = (moves || narrow) && parts.size() > 1;
  uint64_t left = near;
  const auto parts_until = [&](size_t number) {
    return std::accumulate(parts.begin(), parts.begin() + long(number), Part(0), std::bit_or<>());
  };
  const uint64_t each = near / (16 * (parts.size() + reserved)) * 16;
  const auto room_of = [&](size_t number) {
    return number + 1 < parts.size() ? each : left - reserved * each;
  };
  // As shares of all elements; `all` where one thread does three times as many as it should.
  const auto limits_from = [&](size_t number) {
    const auto share = [&](Part part, uint64_t its) {
      const uint64_t elements =
          std::max<uint64_t>(1, tasks_in(part, tasks_of(plan.n, task))) * task;
      return double(ctx.threads) * double(its) / double(elements);
    };
    Limits limits{3 * share(parts[number], room_of(number)), 1};  // if all do as many
    if (stale > 0) limits.all = share(parts_until(stale), each);
    for (; number < parts.size(); ++number)
      limits.all = std::min(limits.all, share(parts[number], room_of(number)));
    return limits;
  };
  const auto run = [&](Part part, uint64_t its) {
    left -= its;
    stages.push_back(std::make_unique<Stage>(ctx, plan.count, states, its));
    run_stage(ctx, plan, fused, states, part, task, *stages.back());
  };
  for (size_t number = 0; number < parts.size(); ++number) {
    if (number > 0) {
      const size_t here = ctx.scratch.mark();
      joined_keys = ctx.scratch.take<uint32_t>(2 * room * uint64_t(workers));
      const Limits limits = limits_from(number);
      parallel_for(workers, uint64_t(count), [&](int worker, uint64_t at) {
        BoundState& state = states[at];
        if (!state.open) return;
        uint32_t* joined = joined_of(worker);
        const Prediction its(stages, int(at), state.since, ranks[at], plan.n);
        const Found found = join(ctx.kernels, stages, int(at), state, joined);
        const double seen = its.share * double(plan.n);
        if (reserved == 0 || !reconsider(state, found, its, number))
          refine(ctx.kernels, state, found, its, {seen * limits.next, seen * limits.all}, joined,
                 joined + room);
      });
      for (const BoundState& state : states) stale = std::max(stale, state.since);
      ctx.scratch.release(here);
    }
    run(parts[number], room_of(number));
  }
  if (stale > 0) {
    run(parts_until(stale), left);
    stages.erase(stages.begin(), stages.begin() + long(stale));
    for (BoundState& state : states) state.since = 0;
  }
  counts = Counts(plan.count, count);
  for (const auto& stage : stages) counts.add(stage->counts);

  // What the counts prove.
  joined_keys = ctx.scratch.take<uint32_t>(2 * room * uint64_t(workers));
  bool open[kSampledBounds] = {};
  parallel_for(workers, uint64_t(count), [&](int worker, uint64_t at) {
    BoundState& state = states[at];
    if (!state.open) return;
    open[at] = true;
    const bool counted = state.bracket.counts_estimate();
    uint32_t *joined = joined_of(worker), *spare = joined + room;
    const Found found = join(ctx.kernels, stages, int(at), state, joined);
    const bool higher = ranks[at] <= (counted ? found.over : found.above);
    if (!found.whole || higher || ranks[at] > found.last()) {
      const Bracket& wide = before[at].bracket;
      const bool narrowed = wide.low != state.bracket.low || wide.high != state.bracket.high;
      if (found.whole && before[at].collect && narrowed && !state.bracket.can_move(higher) &&
          wide.low <= state.bracket.low && wide.high >= state.bracket.high) {
        state.bracket = wide;  // narrowed too far
        return;
      }
      state.lost = !found.whole || !state.bracket.can_move(higher);
      state.bracket.move(higher);
      return;
    }
    state.open = open[at] = false;
    const Bracket& its = state.bracket;
    if (counted && ranks[at] <= found.above) {
      set_end(plan, int(at), end_of(plan, int(at), its.estimate));
      counts.kept[at] = found.above;
      return;
    }
    const uint32_t end = its.collected_high();
    const uint32_t key =
        Order(ctx.kernels, joined, found.inside, its.low, end, spare).nth(ranks[at] - found.above);
    set_end(plan, int(at), end_of(plan, int(at), key));
    uint64_t kept = 0;
    ctx.kernels.count(joined, found.inside, 0, key, &kept);
    counts.kept[at] = key == 0 ? plan.n : found.above + kept;
  });
  const bool complete = std::none_of(open, open + count, [](bool flag) { return flag; });
  if (complete) {
    std::vector<Counts> fixed(size_t(ctx.threads), Counts(plan.count, count));
    const std::vector<uint32_t> ends = keys_of_ends(plan);
    const uint64_t lists = stages[0]->lists.lists.size();
    parallel_for(ctx.threads, lists * stages.size(), [&](int thread, uint64_t task) {
      Stage& stage = *stages[task / lists];
      const size_t bound = size_t(task % lists % uint64_t(count));
      if (!stage.collected[bound] || ends[bound] == stage.estimates[bound]) return;
      FixUp fix_up(ctx, plan, fused, stage.estimates, fixed[size_t(thread)]);
      fix_up.run(int(bound), stage.lists.lists[task % lists]);
      fix_up.flush();
    });
    for (const Counts& own : fixed) counts.add(own);
  }
  for (BoundState& state : states) {
    state.collect = state.open && state.bracket.collects();
    state.since = 0;
  }
  ctx.scratch.release(mark);
  return complete;
}

}  // namespace

SampledMerge merge_sampled(const Context& ctx, Plan<float>& plan, Fused& fused,
                           const std::vector<uint64_t>& ranks) {
  SampledMerge result{false, 0, Counts(plan.count)};
  if (plan.n > UINT32_MAX) return result;  // positions are 32 bits
  const int bounds = bounds_of(plan);
  std::vector<Buffer> sources;
  for (int bound = 0; bound < bounds; ++bound)
    sources.push_back(plan.models[model_of(plan, bound)]);
  std::vector<Segment> segments = {{sources.data(), plan.base, plan.n}};
  segments[0].mirrored = plan.count;
  Bracket brackets[kSampledBounds];
  Staging staging(plan.n, ctx.threads);
  sample_brackets(ctx, segments, 0, bounds, plan.n, ranks.data(), int(staging.parts.size()),
                  brackets);
  std::vector<BoundState> states(static_cast<size_t>(bounds));
  for (int bound = 0; bound < bounds; ++bound) {
    BoundState& state = states[size_t(bound)];
    const uint64_t rank = ranks[size_t(bound)];
    set_end(plan, bound, rank == 0 ? quiet_nan<float>() : end_of(plan, bound, 0));
    if (rank == 0 || rank >= plan.n) continue;
    if (!brackets[bound].sampled) return result;
    state.open = true;
    state.bracket = brackets[bound];
    state.collect = brackets[bound].collects();
  }
  // Scratch is shared out among threads: none for those that there is little to do for, since one
  // may get to do most.
  const Context pass_context{ctx.kernels, int(std::min(uint64_t(ctx.threads), tasks_of(plan.n))),
                             ctx.scratch};
  constexpr int kPasses = 2;
  while (result.passes < kPasses && !result.found) {
    ++result.passes;
    result.found = pass(pass_context, plan, fused, ranks, states, staging, result.counts);
    staging.parts = {kAllTasks};
    for (const BoundState& state : states) {
      if (state.lost) return result;
    }
  }
  if (bounds > plan.count) {  // of a band, by what reaches its one end and its other
    for (size_t k = 0; k < plan.lower.size(); ++k) {
      const uint64_t outside = plan.n - result.counts.kept[plan.lower.size() + k];
      result.counts.kept[k] -= is_nan(plan.lower[k]) ? 0 : outside;
    }
    result.counts.kept.resize(plan.lower.size());
  }
  return result;
}

}  // namespace pymerge::cpu
