// Speculative bracketing: the merge is written while the thresholds that it depends on are still being found.
//
// A sample gives each model a guess of its threshold and a bracket around it. One pass over the inputs merges by the
// guesses, counts what lies above each bracket, and collects (key, position) of what lies inside: a few elements in a thousand.
// The counts prove that the threshold is inside, the collected keys say what it is, and only the elements between it
// and the guess, a tenth of the collected, are merged again. Where keys are heavy (bf16 task vectors have few distinct
// values) the bracket is the guess alone: nothing is collected, the two counts c(> t) < r <= c(>= t) prove it, and
// if they disprove it a second pass takes the next key on the side that they point to.
//
// Bytes moved: the K + 1 inputs once, the output once; 12 bytes written and read for each collected element.

#include <algorithm>
#include <utility>

#include "cpu/ties_plan.h"

namespace pymerge::cpu {
namespace {

struct ModelState {
  bool open = false;     // the threshold is not known yet
  bool collect = false;  // elements inside the bracket are collected
  Bracket bracket;
};

// Collected elements of one model, found by one thread.
struct List {
  uint32_t* keys = nullptr;
  uint64_t* positions = nullptr;
  uint64_t count = 0;
  bool overflow = false;
  char padding[64];
};

struct Lists {
  Lists(const Context& ctx, int models) : models(models), threads(ctx.threads) {
    const uint64_t all = uint64_t(threads) * uint64_t(models);
    capacity = (ctx.scratch.left() - 4096 * all) / (12 * all + 8 * uint64_t(threads));
    lists.resize(all);
    for (List& list : lists) {
      list.keys = ctx.scratch.take<uint32_t>(capacity);
      list.positions = ctx.scratch.take<uint64_t>(capacity);
    }
  }
  List& at(int thread, int model) { return lists[size_t(thread) * size_t(models) + size_t(model)]; }

  void push(int thread, int model, uint32_t key, uint64_t position) {
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

// Merges again, by the new thresholds, the elements of one list that they keep and the guesses did not, or the other way
// round. An element that several models collected belongs to the first whose decision changed.
void mend(const Plan<float>& plan, const std::vector<float>& guesses, int model, List& list, Counts& counts) {
  const float old_lower = guesses[size_t(model)], new_lower = plan.lower[size_t(model)];
  const uint32_t from = float_bits(std::min(old_lower, new_lower)), to = float_bits(std::max(old_lower, new_lower));
  uint64_t found = 0;
  for (uint64_t j = 0; j < list.count; ++j) {
    list.positions[found] = list.positions[j];
    found += list.keys[j] >= from && list.keys[j] < to;
  }
  constexpr uint64_t kAhead = 16;
  const int count = plan.count;
  float delta[kFusedModels];
  bool before[kFusedModels], after[kFusedModels];
  for (uint64_t j = 0; j < found; ++j) {
    if (j + kAhead < found) {
      const uint64_t ahead = list.positions[j + kAhead];
      for (int k = 0; k < count; ++k) __builtin_prefetch(plan.models[k].at(ahead));
      if (plan.base.data != nullptr) __builtin_prefetch(plan.base.at(ahead));
      __builtin_prefetch(static_cast<const char*>(plan.out) + ahead * size_of(plan.out_type), 1);
    }
    const uint64_t i = list.positions[j];
    const float base = base_at(plan, i);
    int owner = -1;
    for (int k = 0; k < count; ++k) {
      delta[k] = delta_at(plan, k, base, i);
      const float size = is_nan(delta[k]) ? 0.0f : magnitude_of(delta[k]);
      before[k] = size >= guesses[size_t(k)];
      after[k] = size >= plan.lower[size_t(k)];
      if (owner < 0 && before[k] != after[k]) owner = k;
    }
    if (owner != model) continue;
    const auto delta_of = [&](int k) { return delta[k]; };
    const Element<float> was = evaluate<float>(plan.rule, count, base, delta_of, [&](int k) { return before[k]; });
    const Element<float> is = evaluate<float>(plan.rule, count, base, delta_of, [&](int k) { return after[k]; });
    store<float>(plan.out_type, plan.out, i, is.value);
    counts.conflicts += uint64_t(is.conflict) - uint64_t(was.conflict);
    counts.positive += uint64_t(is.balance > 0) - uint64_t(was.balance > 0);
    counts.negative += uint64_t(is.balance < 0) - uint64_t(was.balance < 0);
    counts.undecided += uint64_t(is.undecided) - uint64_t(was.undecided);
  }
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
  const FusedLoop loop = ctx.kernels.fused(fused.type, count, fused.weights, compare);
  if (loop == nullptr) return false;
  Lists lists(ctx, count);
  const bool pairs = fused.type == DType::kBFloat16;
  const auto collect = [&](int thread, const FusedMasks& masks, uint64_t i, unsigned size) {
    uint16_t inside[kFusedBlock];
    for (int k = 0; k < count; ++k) {
      if (!states[size_t(k)].collect) continue;
      const unsigned found = ctx.kernels.bracket(masks, k, size, pairs, inside);
      List& list = lists.at(thread, k);
      if (list.count + found > lists.capacity) {
        list.overflow = true;
        continue;
      }
      for (unsigned j = 0; j < found; ++j) {
        const uint64_t at = i + inside[j];
        list.positions[list.count + j] = at;
        list.keys[list.count + j] = key_of(delta_at(plan, k, base_at(plan, at), at));
      }
      list.count += found;
    }
  };
  const auto observe = [&](int thread, Counts& own, int k, float delta, uint64_t i) {
    const ModelState& state = states[size_t(k)];
    if (!state.open) return;
    const uint32_t key = key_of(delta);
    own.high[size_t(k)] += key >= state.bracket.high;
    if (state.collect && key >= state.bracket.low && key < state.bracket.high) lists.push(thread, k, key, i);
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
        const uint32_t next = higher ? state.bracket.up : state.bracket.down;
        state.bracket.high = next + 1;
        state.bracket.low = next;
        state.bracket.guess = next;
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
    if (overflow || ranks[at] <= counts.high[at] || ranks[at] > counts.high[at] + inside) {
      complete = false;
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
        mend(plan, guesses, model, lists.lists[task], mended[size_t(thread)]);
      }
    });
    for (const Counts& own : mended) counts.add(own);
  }
  for (ModelState& state : states) state.collect &= state.open;
  ctx.scratch.release(mark);
  return complete;
}

}  // namespace

Speculation speculate(const Context& ctx, Plan<float>& plan, Fused& fused, const std::vector<uint64_t>& ranks) {
  Speculation result{false, 0, Counts(plan.count)};
  if (ctx.kernels.fused(fused.type, plan.count, fused.weights, Compare::kBracket) == nullptr) return result;
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
    state.collect = brackets[k].high - brackets[k].low > 1;
  }
  constexpr int kPasses = 2;
  while (result.passes < kPasses && !result.found) {
    ++result.passes;
    result.found = pass(ctx, plan, fused, ranks, states, result.counts);
    // A bracket that missed says nothing of where to look next.
    for (const ModelState& state : states) {
      if (!result.found && state.open && state.collect) return result;
    }
  }
  return result;
}

}  // namespace pymerge::cpu
