// Speculative bracketing: the merge is written while the thresholds that it depends on are still being found.
//
// A sample gives each model a guess of its threshold and a bracket around it. One pass over the inputs merges by the
// guesses, counts what lies above each bracket, and collects (key, position) of what lies inside: a few elements in a thousand.
// The counts prove that the threshold is inside, the collected keys say what it is, and only the elements between it
// and the guess, a tenth of the collected, are merged again. Where keys are heavy (bf16 task vectors have few distinct
// values) the bracket is the guess alone: nothing is collected, the two counts c(> t) < r <= c(>= t) prove it, and
// if they disprove it a second pass takes the next key on the side that they point to.
//
// Bytes moved: the K + 1 inputs once, the output once; 8 bytes written and read for each collected element.

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/ties_plan.h"

namespace pymerge::cpu {
namespace {

constexpr unsigned kMendBatch = 256;

struct ModelState {
  bool open = false;     // the threshold is not known yet
  bool collect = false;  // elements inside the bracket are collected
  bool lost = false;     // the bracket missed, and there is no other
  Bracket bracket;
};

// Collected elements of one model, found by one thread.
struct List {
  uint32_t* keys = nullptr;
  uint32_t* positions = nullptr;
  uint64_t count = 0;
  bool overflow = false;
  char padding[64];
};

struct Lists {
  Lists(const Context& ctx, int models) : models(models), threads(ctx.threads) {
    const uint64_t all = uint64_t(threads) * uint64_t(models);
    capacity = (ctx.scratch.left() - 4096 * all) / (8 * all + 8 * uint64_t(threads));
    lists.resize(all);
    for (List& list : lists) {
      list.keys = ctx.scratch.take<uint32_t>(capacity);
      list.positions = ctx.scratch.take<uint32_t>(capacity);
    }
  }
  List& at(int thread, int model) { return lists[size_t(thread) * size_t(models) + size_t(model)]; }

  void push(int thread, int model, uint32_t key, uint32_t position) {
    List& list = at(thread, model);
    if (list.count == capacity) {
      list.overflow = true;
      return;
    }
    list.keys[list.count] = key;
    list.positions[list.count++] = position;
  }

  int models, threads;
  uint64_t capacity;
  std::vector<List> lists;
};

// Merges the elements at positions[0 .. count - 1] again: by the guesses, for what that counted, and by the thresholds.
void mend_batch(const Context& ctx, const Plan<float>& plan, const Fused& fused, FusedLoop loop,
                const std::vector<float>& guesses, const uint32_t* positions, unsigned count,
                Counts& counts) {
  const size_t bytes = size_of(fused.type);
  const unsigned group = bytes == 2 ? 32 : 16;
  const unsigned padded = (count + group - 1) / group * group;
  alignas(64) char staged[kFusedModels + 2]
                         [kMendBatch * 4];  // models, base, output; zeros behind the elements
  const int models = plan.count;
  for (int k = 0; k <= models; ++k) {
    const Buffer& from = k < models ? plan.models[k] : plan.base;
    char* to = staged[k];
    if (from.data == nullptr) {
      memcpy(to, fused_zeros(bytes), padded * bytes);
      continue;
    }
    const char* data = static_cast<const char*>(from.data);
    if (bytes == 2) {
      for (unsigned j = 0; j < count; ++j) memcpy(to + 2 * j, data + size_t(2) * positions[j], 2);
    } else {
      for (unsigned j = 0; j < count; ++j) memcpy(to + 4 * j, data + size_t(4) * positions[j], 4);
    }
    memset(to + count * bytes, 0, (padded - count) * bytes);
  }
  FusedArgs args = fused.args;
  for (int k = 0; k < models; ++k) args.model[k] = staged[k];
  args.base = staged[models];
  args.out = staged[models + 1];
  args.stream = false;
  alignas(64) FusedMasks masks;
  FusedCounts was, is;
  bool fine = true;
  for (const bool now : {false, true}) {
    for (int k = 0; k < models; ++k)
      args.lower[k] = fused_lower(now ? plan.lower[size_t(k)] : guesses[size_t(k)]);
    fine &= loop(args, padded, masks);
    ctx.kernels.fused_counts(masks, models, padded, fused.weights, Compare::kThreshold,
                             now ? is : was);
  }
  if (fine) {
    char* out = static_cast<char*>(plan.out);
    for (unsigned j = 0; j < count; ++j)
      memcpy(out + bytes * positions[j], staged[models + 1] + bytes * j, bytes);
    counts.conflicts += is.conflicts - was.conflicts;
    counts.positive += is.positive - was.positive;
    counts.negative += is.negative - was.negative;
    counts.undecided += is.undecided - was.undecided;
    return;
  }
  for (unsigned j = 0; j < count; ++j) {  // not finite: by the scalar rule
    const uint64_t i = positions[j];
    const float base = base_at(plan, i);
    float delta[kFusedModels], size[kFusedModels];
    for (int k = 0; k < models; ++k) {
      delta[k] = delta_at(plan, k, base, i);
      size[k] = bits_float(key_of(delta[k]));
    }
    const auto delta_of = [&](int k) { return delta[k]; };
    const Element<float> old = evaluate<float>(
        plan.rule, models, base, delta_of, [&](int k) { return size[k] >= guesses[size_t(k)]; });
    const Element<float> now = evaluate<float>(
        plan.rule, models, base, delta_of, [&](int k) { return size[k] >= plan.lower[size_t(k)]; });
    store<float>(plan.out_type, plan.out, i, now.value);
    counts.conflicts += uint64_t(now.conflict) - uint64_t(old.conflict);
    counts.positive += uint64_t(now.balance > 0) - uint64_t(old.balance > 0);
    counts.negative += uint64_t(now.balance < 0) - uint64_t(old.balance < 0);
    counts.undecided += uint64_t(now.undecided) - uint64_t(old.undecided);
  }
}

// Merges again, by the new thresholds, the elements of one list that they keep and the guesses did not, or the other way
// round. An element that several models collected belongs to the first whose decision changed.
void mend(const Context& ctx, const Plan<float>& plan, const Fused& fused, FusedLoop loop,
          const std::vector<float>& guesses, int model, List& list, Counts& counts) {
  uint32_t from[kFusedModels] = {}, to[kFusedModels] = {};  // keys whose decision changed
  for (int k = 0; k <= model; ++k) {
    const float old = guesses[size_t(k)], now = plan.lower[size_t(k)];
    if (!(old != now) || is_nan(old) || is_nan(now)) continue;
    from[k] = float_bits(std::min(old, now));
    to[k] = float_bits(std::max(old, now));
  }
  uint64_t found = 0;
  for (uint64_t j = 0; j < list.count; ++j) {
    list.positions[found] = list.positions[j];
    found += list.keys[j] - from[model] < to[model] - from[model];
  }
  constexpr uint64_t kAhead = 32;
  const uint64_t bytes = size_of(fused.type);
  uint32_t batch[kMendBatch];
  unsigned filled = 0;
  for (uint64_t j = 0; j < found; ++j) {
    if (j + kAhead < found) {
      const uint64_t ahead = list.positions[j + kAhead];
      for (int k = 0; k < plan.count; ++k) __builtin_prefetch(plan.models[k].at(ahead));
      if (plan.base.data != nullptr) __builtin_prefetch(plan.base.at(ahead));
      __builtin_prefetch(static_cast<const char*>(plan.out) + ahead * bytes, 1);
    }
    const uint64_t i = list.positions[j];
    const float base = base_at(plan, i);
    bool owned = true;
    for (int k = 0; k < model; ++k)
      owned &= key_of(delta_at(plan, k, base, i)) - from[k] >= to[k] - from[k];
    batch[filled] = uint32_t(i);
    filled += owned;
    if (filled == kMendBatch) {
      mend_batch(ctx, plan, fused, loop, guesses, batch, filled, counts);
      filled = 0;
    }
  }
  if (filled > 0) mend_batch(ctx, plan, fused, loop, guesses, batch, filled, counts);
}

// One pass by the guesses. True where every threshold is known afterwards, and everything merged by it; the states of
// the models that the counts disproved stay open.
bool pass(const Context& ctx, Plan<float>& plan, Fused& fused, const std::vector<uint64_t>& ranks,
          std::vector<ModelState>& states, Counts& counts) {
  const size_t mark = ctx.scratch.mark();
  const int count = plan.count;
  Compare compare = Compare::kHigh;
  for (int k = 0; k < count; ++k) {
    const ModelState& state = states[size_t(k)];
    const float never = quiet_nan<float>();
    if (state.open) plan.lower[size_t(k)] = bits_float(state.bracket.guess);
    fused.args.high[k] = state.open ? bits_float(state.bracket.high) : never;
    fused.args.low[k] = state.open && state.collect ? bits_float(state.bracket.low) : never;
    if (state.open && state.collect) compare = Compare::kBracket;
  }
  const FusedLoop loop =
      ctx.kernels.fused(fused.type, count, fused.weights, compare, plan.rule.zero_negative);
  const FusedLoop mender = ctx.kernels.fused(fused.type, count, fused.weights, Compare::kThreshold,
                                             plan.rule.zero_negative);
  if (loop == nullptr || mender == nullptr) return false;
  Lists lists(ctx, count);
  const auto collect = [&](int thread, const FusedArgs& args, const FusedMasks& masks, uint64_t i,
                           unsigned size) {
    for (int k = 0; k < count; ++k) {
      if (!states[size_t(k)].collect) continue;
      List& list = lists.at(thread, k);
      if (list.count + kFusedBlock + 16 > lists.capacity) {
        list.overflow = true;
        continue;
      }
      list.count += ctx.kernels.collect(fused.type, args, k, masks, size, uint32_t(i),
                                        list.keys + list.count, list.positions + list.count);
    }
  };
  const auto observe = [&](int thread, Counts& own, int k, float delta, uint64_t i) {
    const ModelState& state = states[size_t(k)];
    if (!state.open) return;
    const uint32_t key = key_of(delta);
    own.high[size_t(k)] += key >= state.bracket.high;
    if (state.collect && key >= state.bracket.low && key < state.bracket.high)
      lists.push(thread, k, key, uint32_t(i));
  };
  counts = run_fused({ctx, plan, fused, loop, compare}, collect, observe);

  // What the counts prove.
  const std::vector<float> guesses = plan.lower;
  const uint64_t room = lists.capacity * uint64_t(ctx.threads);
  uint32_t* joined = ctx.scratch.take<uint32_t>(2 * (room + 32));
  bool complete = true, changed = false;
  for (int k = 0; k < count; ++k) {
    ModelState& state = states[size_t(k)];
    const size_t at = size_t(k);
    if (!state.open) continue;
    if (!state.collect) {
      const bool higher = ranks[at] <= counts.high[at], lower = ranks[at] > counts.kept[at];
      if (higher || lower) {
        complete = false;
        state.lost = !state.bracket.can_move(higher);
        state.bracket.move(higher);
      } else {
        state.open = false;
      }
      continue;
    }
    uint64_t inside = 0;
    bool overflow = false;
    for (int thread = 0; thread < ctx.threads; ++thread) {
      const List& list = lists.at(thread, k);
      overflow |= list.overflow;
      if (overflow) break;
      std::copy(list.keys, list.keys + list.count, joined + inside);
      inside += list.count;
    }
    const bool higher = ranks[at] <= counts.high[at];
    if (overflow || higher || ranks[at] > counts.high[at] + inside) {
      complete = false;
      state.lost = overflow || !state.bracket.can_move(higher);
      state.bracket.move(higher);
      continue;
    }
    uint32_t* spare = joined + ((inside + 31) & ~uint64_t(15));
    const uint32_t key = nth_key(ctx.kernels, joined, inside, ranks[at] - counts.high[at], spare);
    plan.lower[at] = bits_float(key);
    uint64_t kept = 0;
    ctx.kernels.partition(joined, inside, 0, key, spare, &kept);
    counts.kept[at] = key == 0 ? plan.n : counts.high[at] + kept;
    state.open = false;
    changed |= key != state.bracket.guess;
  }
  if (complete && changed) {
    std::vector<Counts> mended(size_t(ctx.threads), Counts(count));
    parallel_for(ctx.threads, lists.lists.size(), [&](int thread, uint64_t task) {
      const int model = int(task % uint64_t(count));
      if (states[size_t(model)].collect && plan.lower[size_t(model)] != guesses[size_t(model)]) {
        mend(ctx, plan, fused, mender, guesses, model, lists.lists[task], mended[size_t(thread)]);
      }
    });
    for (const Counts& own : mended) counts.add(own);
  }
  for (ModelState& state : states) state.collect = state.open && state.bracket.collects();
  ctx.scratch.release(mark);
  return complete;
}

}  // namespace

Speculation speculate(const Context& ctx, Plan<float>& plan, Fused& fused,
                      const std::vector<uint64_t>& ranks) {
  Speculation result{false, 0, Counts(plan.count)};
  if (ctx.kernels.fused(fused.type, plan.count, fused.weights, Compare::kBracket,
                        plan.rule.zero_negative) == nullptr)
    return result;
  if (plan.n > UINT32_MAX) return result;  // positions are 32 bits
  const std::vector<Segment> segments = {{plan.models, plan.base, plan.n}};
  Bracket brackets[kFusedModels];
  sample_brackets(ctx, segments, 0, plan.count, plan.n, ranks.data(), brackets);
  std::vector<ModelState> states(size_t(plan.count));
  for (int k = 0; k < plan.count; ++k) {
    ModelState& state = states[size_t(k)];
    const uint64_t rank = ranks[size_t(k)];
    plan.lower[size_t(k)] = rank == 0 ? quiet_nan<float>() : 0.0f;
    if (rank == 0 || rank >= plan.n) continue;
    if (!brackets[k].sampled) return result;
    state.open = true;
    state.bracket = brackets[k];
    state.collect = brackets[k].collects();
  }
  constexpr int kPasses = 2;
  while (result.passes < kPasses && !result.found) {
    ++result.passes;
    result.found = pass(ctx, plan, fused, ranks, states, result.counts);
    for (const ModelState& state : states) {
      if (state.lost) return result;
    }
  }
  return result;
}

}  // namespace pymerge::cpu
