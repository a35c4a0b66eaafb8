#include "cpu/ties/select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "cpu/core/threads.h"
#include "cpu/ties/order.h"

namespace pymerge::cpu {
namespace {

constexpr unsigned kBlock = 1024;      // keys worked on at a time, in the L1 cache
constexpr int kSelectModels = 8;       // at once
constexpr uint64_t kDirect = 1 << 17;  // up to here all keys are computed and kept

// Tasks over segments: task t is elements [begin, end) of one of them.
struct Tasks {
  struct Range {
    const Segment* segment;
    uint64_t begin, end;
  };
  explicit Tasks(const std::vector<Segment>& segments) {
    for (const Segment& segment : segments) {
      first_.push_back(count);
      count += (segment.n + kTask - 1) / kTask;
    }
    all_ = segments.data();
  }
  Range at(uint64_t task) const {
    const size_t s =
        size_t(std::upper_bound(first_.begin(), first_.end(), task) - first_.begin()) - 1;
    const uint64_t begin = (task - first_[s]) * kTask;
    return {&all_[s], begin, std::min(begin + kTask, all_[s].n)};
  }
  uint64_t count = 0;

 private:
  std::vector<uint64_t> first_;
  const Segment* all_;
};

// Candidates of one thread and model: packed keys, and how many were above them.
struct Candidates {
  uint32_t* keys;
  uint64_t count = 0, above = 0;
  bool overflow = false;
  char padding[64];
};

// The norms of a group's models in one pass: of all elements, and of those above the brackets.
class GroupNorms {
 public:
  GroupNorms(const Context& ctx, KeptNorms& kept, int first, int count, const Bracket* brackets,
             const uint64_t* ranks, uint64_t total)
      : kernels_(ctx.kernels), kept_(kept), first_(size_t(first)), count_(size_t(count)) {
    for (size_t j = 0; j < count_; ++j) {
      const uint32_t high = ranks[j] == 0       ? kInfinityKey + 1
                            : ranks[j] >= total ? 0
                                                : brackets[j].high;
      kept.models[first_ + j].lower = bits_float(high);  // above infinity: a NaN, which keeps none
    }
    args_ = kept.args;
    args_.models = kept.models.data() + first;
    args_.count = count;
    owned_.resize(size_t(ctx.threads));
    for (Own& own : owned_) {
      own.lanes.resize(2 * kRow * count_);
      own.sums.resize(2 * count_);
      own.totals.resize(2 * count_);
    }
  }

  void add(int thread, uint64_t begin, uint64_t end) {
    Own& own = owned_[size_t(thread)];
    for (; begin < end; begin += kNormCall) {
      const unsigned some = unsigned(std::min<uint64_t>(kNormCall, end - begin));
      kernels_.norms(args_, begin, some, kept_.norm, nullptr, 0, own.lanes.data(), own.sums.data());
      for (size_t row = 0; row < 2 * count_; ++row)
        join(kept_.norm, own.totals[row], own.sums[row]);
    }
  }

  void finish() {
    for (const Own& own : owned_) {
      for (size_t row = 0; row < 2 * count_; ++row)
        join(kept_.norm, kept_.totals[2 * first_ + row], own.totals[row]);
    }
  }

  // What else model j keeps: so many elements of a key, or those of a list from `key` on.
  void keep(size_t j, uint32_t key, uint64_t times) {
    const double each = times == 0 ? 0 : term(key);
    join(kept_.norm, kept_.totals[2 * (first_ + j) + 1],
         kept_.norm == Norms::kLargest ? each : double(times) * each);
  }
  void keep(size_t j, uint32_t key, const uint32_t* keys, uint64_t count) {
    constexpr uint64_t kStep = 1024;
    for (uint64_t from = 0; from < count; from += kStep) {
      double sum = 0;
      for (uint64_t i = from; i < std::min(count, from + kStep); ++i) {
        if (keys[i] >= key) join(kept_.norm, sum, term(keys[i]));
      }
      join(kept_.norm, kept_.totals[2 * (first_ + j) + 1], sum);
    }
    kept_.additions = std::max(kept_.additions, kStep + count / kStep);
  }

 private:
  double term(uint32_t key) const {
    const double size = double(bits_float(key));
    return kept_.norm == Norms::kSquares ? size * size : size;
  }
  struct Own {
    std::vector<double> lanes, sums, totals;
    char padding[64];
  };
  const Kernels& kernels_;
  KeptNorms& kept_;
  const size_t first_, count_;
  FusedArgs args_;
  std::vector<Own> owned_;
};

// Counts and collects for all brackets in one pass over the inputs.
void count_pass(const Context& ctx, const Tasks& tasks, int first, int count,
                const Bracket* brackets, const bool* wanted, uint64_t capacity,
                std::vector<Candidates>& lists, GroupNorms* norms) {
  const Kernels& kernels = ctx.kernels;
  parallel_for(ctx.threads, tasks.count, [&](int thread, uint64_t task) {
    const Tasks::Range range = tasks.at(task);
    uint32_t keys[kBlock + 16], packed[kBlock + 16];
    for (uint64_t i = range.begin; i < range.end; i += kBlock) {
      const uint64_t block = std::min<uint64_t>(kBlock, range.end - i);
      const void* of = nullptr;  // whose keys these are
      DType of_type = DType::kFloat32;
      for (int j = 0; j < count; ++j) {
        if (!wanted[j]) continue;
        Candidates& list = lists[size_t(thread) * kSelectModels + size_t(j)];
        const Buffer& x = range.segment->models[first + j];
        if (x.data != of || x.type != of_type) {  // two ranks of a model, one behind the other
          range.segment->keys(kernels, first + j, i, block, keys);
          of = x.data;
          of_type = x.type;
        }
        const uint64_t found =
            kernels.partition(keys, block, brackets[j].low, brackets[j].high, packed, &list.above);
        if (!brackets[j].collects()) {
          list.count += found;
          continue;
        }
        if (list.count + found > capacity) {
          list.overflow = true;
          continue;
        }
        std::copy(packed, packed + found, list.keys + list.count);
        list.count += found;
      }
      // While the elements are in the caches.
      const uint64_t end = i + block;
      if (norms != nullptr && (end % kNormCall == 0 || end == range.end))
        norms->add(thread, (end - 1) / kNormCall * kNormCall, end);
    }
  });
}

// The rank-th largest key by two histograms of 16 bits each.
uint32_t radix(const Context& ctx, const std::vector<Segment>& segments, int model, uint64_t rank) {
  const Tasks tasks(segments);
  const size_t mark = ctx.scratch.mark();
  constexpr size_t kBins = size_t(1) << 16;
  // A thread's histogram is 512 KB: at most half of the scratch.
  const int threads = int(
      std::min<uint64_t>({uint64_t(ctx.threads), tasks.count, kScratchBytes / 2 / (kBins * 8)}));
  uint64_t* bins = ctx.scratch.take<uint64_t>(kBins * size_t(threads));
  uint32_t prefix = 0;
  for (int pass = 0; pass < 2; ++pass) {
    std::fill(bins, bins + kBins * size_t(threads), 0);
    parallel_for(threads, tasks.count, [&](int thread, uint64_t task) {
      const Tasks::Range range = tasks.at(task);
      uint64_t* own = bins + kBins * size_t(thread);
      uint32_t keys[kBlock + 16];
      for (uint64_t i = range.begin; i < range.end; i += kBlock) {
        const uint64_t block = std::min<uint64_t>(kBlock, range.end - i);
        range.segment->keys(ctx.kernels, model, i, block, keys);
        if (pass == 0) {
          for (uint64_t j = 0; j < block; ++j) ++own[keys[j] >> 16];
        } else {
          for (uint64_t j = 0; j < block; ++j) own[keys[j] & 0xffff] += keys[j] >> 16 == prefix;
        }
      }
    });
    size_t bin = kBins;
    uint64_t left = rank;
    while (bin-- > 0) {
      uint64_t in_bin = 0;
      for (int thread = 0; thread < threads; ++thread) in_bin += bins[kBins * size_t(thread) + bin];
      if (left <= in_bin) break;
      left -= in_bin;
    }
    rank = left;
    prefix = prefix << 16 | uint32_t(bin);
  }
  ctx.scratch.release(mark);
  return prefix;
}

// Up to kSelectModels models at once; ranks within [1, total - 1].
void select_group(const Context& ctx, const std::vector<Segment>& segments, int first, int count,
                  uint64_t total, const uint64_t* ranks, uint32_t* keys, KeptNorms* kept) {
  const Tasks tasks(segments);
  const size_t mark = ctx.scratch.mark();
  const auto skipped = [&](int j) { return ranks[j] == 0 || ranks[j] >= total; };
  if (total <= kDirect) {
    if (kept != nullptr) kept->known = false;
    const uint64_t room = (total + 31) & ~uint64_t(15);
    uint32_t* all = ctx.scratch.take<uint32_t>(room * size_t(count));
    const int threads = total * uint64_t(count) < 50000 ? 1 : ctx.threads;
    parallel_for(threads, uint64_t(count), [&](int, uint64_t j) {
      if (skipped(int(j))) return;
      uint32_t* own = all + room * j;
      uint64_t filled = 0;
      for (const Segment& segment : segments) {
        segment.keys(ctx.kernels, first + int(j), 0, segment.n, own + filled);
        filled += segment.n;
      }
      keys[j] = nth_key(ctx.kernels, own, total, ranks[j]);
    });
    ctx.scratch.release(mark);
    return;
  }

  Bracket brackets[kSelectModels];
  sample_brackets(ctx, segments, first, count, total, ranks, 1, brackets);
  bool wanted[kSelectModels] = {};
  for (int j = 0; j < count; ++j) {
    wanted[j] = !skipped(j);
    brackets[j].part_from_atom();
  }
  const int threads = int(std::min(uint64_t(ctx.threads), tasks.count));
  // A list a thread and model, and room for one model's lists put together.
  const uint64_t capacity =
      ctx.scratch.left() / sizeof(uint32_t) / (uint64_t(threads) * uint64_t(count + 1)) / 16 * 16 -
      64;
  std::vector<Candidates> lists(size_t(threads) * kSelectModels);
  for (int thread = 0; thread < threads; ++thread) {
    for (int j = 0; j < count; ++j) {
      lists[size_t(thread) * kSelectModels + size_t(j)].keys = ctx.scratch.take<uint32_t>(capacity);
    }
  }
  uint32_t* joined = ctx.scratch.take<uint32_t>(capacity * uint64_t(threads) + 32);
  std::optional<GroupNorms> norms;
  if (kept != nullptr) norms.emplace(ctx, *kept, first, count, brackets, ranks, total);
  bool missed[kSelectModels] = {};
  for (bool again = true; again;) {
    again = false;
    count_pass(ctx, tasks, first, count, brackets, wanted, capacity, lists,
               norms ? &*norms : nullptr);
    if (norms) norms->finish();
    for (int j = 0; j < count; ++j) {
      if (!wanted[j]) continue;
      wanted[j] = false;
      uint64_t above = 0, inside = 0;
      bool overflow = false;
      std::vector<std::pair<const uint32_t*, uint64_t>> parts;
      for (int thread = 0; thread < threads; ++thread) {
        Candidates& list = lists[size_t(thread) * kSelectModels + size_t(j)];
        overflow |= list.overflow;
        if (!overflow && brackets[j].collects()) {
          std::copy(list.keys, list.keys + list.count, joined + inside);
        }
        above += list.above;
        inside += list.count;
        parts.push_back({list.keys, list.count});
        list.above = list.count = 0;
        list.overflow = false;
      }
      const bool higher = ranks[j] <= above;
      missed[j] = overflow || higher || ranks[j] > above + inside;
      if (missed[j] && !overflow && brackets[j].can_move(higher)) {
        brackets[j].move(higher);
        brackets[j].part_from_atom();
        wanted[j] = again = true;
      } else if (!missed[j]) {
        keys[j] = brackets[j].low;
        if (brackets[j].collects()) {
          const Bracket& its = brackets[j];
          keys[j] =
              Order(ctx.kernels, joined, inside, its.low, its.high, joined).nth(ranks[j] - above);
          for (const auto& [list, length] : parts) {
            if (norms) norms->keep(size_t(j), keys[j], list, length);
          }
        } else if (norms) {
          norms->keep(size_t(j), keys[j], inside);
        }
      }
    }
    // Another pass is one over all elements again.
    if (norms && again) norms.reset(), kept->known = false;
  }
  ctx.scratch.release(mark);
  for (int j = 0; j < count; ++j) {
    if (missed[j] && kept != nullptr) kept->known = false;
    if (missed[j]) keys[j] = radix(ctx, segments, first + j, ranks[j]);
  }
}

void wide_keys(const Segment& segment, size_t model, uint64_t i, uint64_t count, uint64_t* keys) {
  if (segment.wide != nullptr) return (*segment.wide)(i, count, keys);
  const Buffer& x = segment.models[model];
  const Buffer& base = segment.base;
  for (uint64_t j = 0; j < count; ++j) {
    double delta = load<double>(x.type, x.data, i + j);
    if (base.data != nullptr) delta -= load<double>(base.type, base.data, i + j);
    keys[j] = is_nan(delta) ? 0 : bit_cast<uint64_t>(delta) & 0x7fffffffffffffffull;
  }
}

// Portable selection in binary64: four histograms of 16 bits each.
double select_double(const Context& ctx, const std::vector<Segment>& segments, size_t model,
                     uint64_t rank) {
  const Tasks tasks(segments);
  const size_t mark = ctx.scratch.mark();
  constexpr size_t kBins = size_t(1) << 16;
  const int threads = int(
      std::min<uint64_t>({uint64_t(ctx.threads), tasks.count, kScratchBytes / 2 / (kBins * 8)}));
  uint64_t* bins = ctx.scratch.take<uint64_t>(kBins * size_t(threads));
  uint64_t prefix = 0;
  for (int shift = 48; shift >= 0; shift -= 16) {
    std::fill(bins, bins + kBins * size_t(threads), 0);
    parallel_for(threads, tasks.count, [&](int thread, uint64_t task) {
      const Tasks::Range range = tasks.at(task);
      uint64_t* own = bins + kBins * size_t(thread);
      uint64_t keys[kBlock + 16];
      for (uint64_t i = range.begin; i < range.end; i += kBlock) {
        const uint64_t block = std::min<uint64_t>(kBlock, range.end - i);
        wide_keys(*range.segment, model, i, block, keys);
        for (uint64_t j = 0; j < block; ++j) {
          if (shift == 48 || keys[j] >> (shift + 16) == prefix) ++own[keys[j] >> shift & 0xffff];
        }
      }
    });
    size_t bin = kBins;
    while (bin-- > 0) {
      uint64_t in_bin = 0;
      for (int thread = 0; thread < threads; ++thread) in_bin += bins[kBins * size_t(thread) + bin];
      if (rank <= in_bin) break;
      rank -= in_bin;
    }
    prefix = prefix << 16 | bin;
  }
  ctx.scratch.release(mark);
  return bit_cast<double>(prefix);
}

uint64_t total_of(const std::vector<Segment>& segments) {
  uint64_t total = 0;
  for (const Segment& segment : segments) total += segment.n;
  return total;
}

std::vector<float> select_floats(const Context& ctx, const std::vector<Segment>& segments,
                                 const std::vector<uint64_t>& ranks, KeptNorms* kept) {
  const uint64_t total = total_of(segments);
  std::vector<uint32_t> keys(ranks.size());
  for (size_t first = 0; first < ranks.size(); first += kSelectModels) {
    const int count = int(std::min<size_t>(kSelectModels, ranks.size() - first));
    const bool any = std::any_of(ranks.begin() + long(first), ranks.begin() + long(first) + count,
                                 [&](uint64_t rank) { return rank > 0 && rank < total; });
    if (any)
      select_group(ctx, segments, int(first), count, total, ranks.data() + first,
                   keys.data() + first, kept);
    else if (kept != nullptr)
      kept->known = false;
  }
  std::vector<float> thresholds;
  for (size_t k = 0; k < ranks.size(); ++k) {
    const bool none = ranks[k] == 0 || total == 0;
    thresholds.push_back(none                ? quiet_nan<float>()
                         : ranks[k] >= total ? 0.0f
                                             : bits_float(keys[k]));
  }
  return thresholds;
}

}  // namespace

template <>
std::vector<float> select<float>(const Context& ctx, const std::vector<Segment>& segments,
                                 const std::vector<uint64_t>& ranks) {
  return select_floats(ctx, segments, ranks, nullptr);
}

std::vector<float> select_with_norms(const Context& ctx, const Segment& segment,
                                     const std::vector<uint64_t>& ranks, KeptNorms& kept) {
  return select_floats(ctx, {segment}, ranks, &kept);
}

template <>
std::vector<double> select<double>(const Context& ctx, const std::vector<Segment>& segments,
                                   const std::vector<uint64_t>& ranks) {
  const uint64_t total = total_of(segments);
  std::vector<double> thresholds;
  for (size_t k = 0; k < ranks.size(); ++k) {
    const bool none = ranks[k] == 0 || total == 0;
    thresholds.push_back(none                ? quiet_nan<double>()
                         : ranks[k] >= total ? 0.0
                                             : select_double(ctx, segments, k, ranks[k]));
  }
  return thresholds;
}

}  // namespace pymerge::cpu
