#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/threads.h"

namespace pymerge::cpu {
namespace {

constexpr unsigned kBlock = 1024;      // keys worked on at a time, in the L1 cache
constexpr uint64_t kDirect = 1 << 17;  // up to here all keys are computed and kept
// The sample is this times n^(2/3) keys. 16-bit types have heavy keys, for which half of it says as much.
constexpr double kSampleScale = 8;
constexpr double kSigmas = 3.5;
constexpr double kNearSigmas = 1.5;
constexpr double kMostInside = 0.008;  // of all elements, in a bracket that is collected

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

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// A sample's order statistics near one rank: the part of the keys around it, found once.
class Neighbourhood {
 public:
  Neighbourhood(const Kernels& kernels, const uint32_t* keys, uint64_t count, double share,
                uint32_t* part, uint32_t* spare)
      : kernels_(kernels), keys_(keys), count_(count), part_(part), spare_(spare) {
    constexpr unsigned kProbe = 1024;
    uint32_t probe[kProbe];
    for (unsigned j = 0; j < kProbe; ++j) {
      const uint64_t cell = count / kProbe;
      probe[j] = keys[j * cell + mix(j) % cell];
    }
    const double slack = 7 * std::sqrt(share * (1 - share) * kProbe) + 8;
    const int above = std::max(0, int(share * kProbe - slack));
    const int below = std::min(int(kProbe) - 1, int(share * kProbe + slack));
    std::nth_element(probe, probe + above, probe + kProbe, std::greater<uint32_t>());
    const uint32_t high = above == 0 ? kInfinityKey + 1 : probe[above] + 1;
    std::nth_element(probe, probe + below, probe + kProbe, std::greater<uint32_t>());
    const uint32_t low = below == int(kProbe) - 1 ? 0 : probe[below];
    low_ = low;
    high_ = high;
    inside_ = kernels.partition(keys, count, low, high, part, &above_);
  }

  // How many keys are in [low, high), and how many above.
  uint64_t count(uint32_t low, uint32_t high, uint64_t* above) const {
    *above = 0;
    if (low < low_ || high > high_) return kernels_.count(keys_, count_, low, high, above);
    const uint64_t inside = kernels_.count(part_, inside_, low, high, above);
    *above += above_;
    return inside;
  }

  uint32_t nth(uint64_t rank) const {
    if (rank > above_ && rank <= above_ + inside_) {
      return nth_key(kernels_, part_, inside_, rank - above_, spare_);
    }
    return nth_key(kernels_, keys_, count_, rank, spare_);
  }

 private:
  const Kernels& kernels_;
  const uint32_t* keys_;
  uint64_t count_;
  uint32_t *part_, *spare_;
  uint32_t low_ = 0, high_ = 0;
  uint64_t above_ = 0, inside_ = 0;
};

// The bracket of one rank from `units` units of `unit` keys, in the tensor's order.
Bracket make_bracket(const Kernels& kernels, const uint32_t* keys, uint64_t units, unsigned unit,
                     double share, uint32_t* part, uint32_t* spare, uint16_t* counts) {
  const uint64_t m = units * unit;
  const Neighbourhood near(kernels, keys, m, share, part, spare);
  const double target = share * double(m);
  Bracket bracket;
  bracket.guess = near.nth(std::clamp<uint64_t>(uint64_t(std::ceil(target)), 1, m));
  // Units differ more than independent elements would: their successive differences say by how much.
  kernels.count_units(keys, units, unit, bracket.guess, counts);
  double squares = 0;
  for (uint64_t u = 1; u < units; ++u) {
    const double step = double(counts[u]) - double(counts[u - 1]);
    squares += step * step;
  }
  const double sigma =
      std::sqrt(squares / 2 / double(units - 1) * double(units));  // of the count of m
  const double reach = kSigmas * sigma + 2;
  bracket.high = target - reach < 1 ? kInfinityKey + 1 : near.nth(uint64_t(target - reach)) + 1;
  bracket.low = target + reach >= double(m) ? 0 : near.nth(uint64_t(target + reach) + 1);
  const double close = kNearSigmas / kSigmas * reach;
  bracket.near_high = target - close < 1 ? bracket.high : near.nth(uint64_t(target - close)) + 1;
  bracket.near_low = target + close >= double(m) ? 0 : near.nth(uint64_t(target + close) + 1);
  bracket.sampled = true;
  const auto inside = [&](uint32_t low, uint32_t high, uint64_t& above) {
    return double(near.count(low, high, &above));
  };
  uint64_t above = 0;
  // Distinct keys fill a bracket to twice the reach; half as much again says that there are heavy ones.
  const double limit = std::max(kMostInside * double(m), 3 * reach);
  if (inside(bracket.low, bracket.high, above) <= limit) return bracket;
  // Heavy keys. Without the one at an edge it may do.
  const uint32_t outer_low = bracket.low, outer_high = bracket.high;
  if (bracket.low != bracket.guess && inside(bracket.low, bracket.low + 1, above) > limit / 4) {
    bracket.below = {bracket.low, bracket.low, bracket.low + 1};
    ++bracket.low;
  }
  if (bracket.high - 1 != bracket.guess &&
      inside(bracket.high - 1, bracket.high, above) > limit / 4) {
    --bracket.high;
    bracket.above = {bracket.high, bracket.high, bracket.high + 1};
  }
  if (inside(bracket.low, bracket.high, above) <= limit) return bracket;
  bracket.low = bracket.guess;
  bracket.high = bracket.guess + 1;
  const uint64_t equal = uint64_t(inside(bracket.low, bracket.high, above));
  const uint64_t over = above;
  if (over > 0) {
    const uint32_t next = near.nth(over);
    const uint32_t end = std::max(outer_high, next + 1);
    const bool light = inside(bracket.guess + 1, end, above) <= limit;
    bracket.above =
        light ? Bracket::Side{next, bracket.guess + 1, end} : Bracket::Side{next, next, next + 1};
  }
  if (over + equal < m) {
    const uint32_t next = near.nth(over + equal + 1);
    const uint32_t begin = std::min(outer_low, next);
    const bool light = inside(begin, bracket.guess, above) <= limit;
    bracket.below =
        light ? Bracket::Side{next, begin, bracket.guess} : Bracket::Side{next, next, next + 1};
  }
  return bracket;
}

// Candidates of one thread and model: packed keys, and how many were above them.
struct Candidates {
  uint32_t* keys;
  uint64_t count = 0, above = 0;
  bool overflow = false;
  char padding[64];
};

// Counts and collects for all brackets in one pass over the inputs.
void count_pass(const Context& ctx, const Tasks& tasks, int first, int count,
                const Bracket* brackets, const bool* wanted, uint64_t capacity,
                std::vector<Candidates>& lists) {
  const Kernels& kernels = ctx.kernels;
  parallel_for(ctx.threads, tasks.count, [&](int thread, uint64_t task) {
    const Tasks::Range range = tasks.at(task);
    uint32_t keys[kBlock + 16], packed[kBlock + 16];
    for (uint64_t i = range.begin; i < range.end; i += kBlock) {
      const uint64_t block = std::min<uint64_t>(kBlock, range.end - i);
      for (int j = 0; j < count; ++j) {
        if (!wanted[j]) continue;
        Candidates& list = lists[size_t(thread) * kFusedModels + size_t(j)];
        kernels.keys(range.segment->models[first + j], range.segment->base, i, block, keys);
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
        ctx.kernels.keys(range.segment->models[model], range.segment->base, i, block, keys);
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

// Up to kFusedModels models at once; ranks within [1, total - 1].
void select_group(const Context& ctx, const std::vector<Segment>& segments, int first, int count,
                  uint64_t total, const uint64_t* ranks, uint32_t* keys) {
  const Tasks tasks(segments);
  const size_t mark = ctx.scratch.mark();
  const auto skipped = [&](int j) { return ranks[j] == 0 || ranks[j] >= total; };
  if (total <= kDirect) {
    const uint64_t room = (total + 31) & ~uint64_t(15);
    uint32_t* all = ctx.scratch.take<uint32_t>(2 * room * size_t(count));
    const int threads = total * uint64_t(count) < 50000 ? 1 : ctx.threads;
    parallel_for(threads, uint64_t(count), [&](int, uint64_t j) {
      if (skipped(int(j))) return;
      uint32_t* own = all + 2 * room * j;
      uint64_t filled = 0;
      for (const Segment& segment : segments) {
        ctx.kernels.keys(segment.models[first + int(j)], segment.base, 0, segment.n, own + filled);
        filled += segment.n;
      }
      keys[j] = nth_key(ctx.kernels, own, total, ranks[j], own + room);
    });
    ctx.scratch.release(mark);
    return;
  }

  Bracket brackets[kFusedModels];
  sample_brackets(ctx, segments, first, count, total, ranks, brackets);
  bool wanted[kFusedModels] = {};
  for (int j = 0; j < count; ++j) wanted[j] = !skipped(j);
  const int threads = ctx.threads;
  // A list a thread and model, and room for two models' lists put together.
  const uint64_t capacity =
      ctx.scratch.left() / sizeof(uint32_t) / (uint64_t(threads) * uint64_t(count + 2)) / 16 * 16 -
      64;
  std::vector<Candidates> lists(size_t(threads) * kFusedModels);
  for (int thread = 0; thread < threads; ++thread) {
    for (int j = 0; j < count; ++j) {
      lists[size_t(thread) * kFusedModels + size_t(j)].keys = ctx.scratch.take<uint32_t>(capacity);
    }
  }
  uint32_t* joined = ctx.scratch.take<uint32_t>(2 * (capacity * uint64_t(threads) + 32));
  bool missed[kFusedModels] = {};
  for (bool again = true; again;) {
    again = false;
    count_pass(ctx, tasks, first, count, brackets, wanted, capacity, lists);
    for (int j = 0; j < count; ++j) {
      if (!wanted[j]) continue;
      wanted[j] = false;
      uint64_t above = 0, inside = 0;
      bool overflow = false;
      for (int thread = 0; thread < threads; ++thread) {
        Candidates& list = lists[size_t(thread) * kFusedModels + size_t(j)];
        overflow |= list.overflow;
        if (!overflow && brackets[j].collects()) {
          std::copy(list.keys, list.keys + list.count, joined + inside);
        }
        above += list.above;
        inside += list.count;
        list.above = list.count = 0;
        list.overflow = false;
      }
      const bool higher = ranks[j] <= above;
      missed[j] = overflow || higher || ranks[j] > above + inside;
      if (missed[j] && !overflow && brackets[j].can_move(higher)) {
        brackets[j].move(higher);
        wanted[j] = again = true;
      } else if (!missed[j]) {
        keys[j] = brackets[j].low;
        if (brackets[j].collects()) {
          uint32_t* spare = joined + ((inside + 31) & ~uint64_t(15));
          keys[j] = nth_key(ctx.kernels, joined, inside, ranks[j] - above, spare);
        }
      }
    }
  }
  ctx.scratch.release(mark);
  for (int j = 0; j < count; ++j) {
    if (missed[j]) keys[j] = radix(ctx, segments, first + j, ranks[j]);
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
      const Buffer& x = range.segment->models[model];
      const Buffer& base = range.segment->base;
      for (uint64_t i = range.begin; i < range.end; ++i) {
        double delta = load<double>(x.type, x.data, i);
        if (base.data != nullptr) delta -= load<double>(base.type, base.data, i);
        const uint64_t key = is_nan(delta) ? 0 : bit_cast<uint64_t>(delta) & 0x7fffffffffffffffull;
        if (shift == 48 || key >> (shift + 16) == prefix) ++own[key >> shift & 0xffff];
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

}  // namespace

uint32_t nth_key(const Kernels& kernels, const uint32_t* keys, uint64_t count, uint64_t rank,
                 uint32_t* spare) {
  constexpr int kProbe = 512;
  const uint64_t all = count, asked = rank;
  const uint32_t* from = keys;
  while (count > 4096) {
    uint32_t probe[kProbe];
    const uint64_t cell = count / kProbe;
    for (unsigned j = 0; j < kProbe; ++j) probe[j] = from[j * cell + mix(j + count) % cell];
    const double share = double(rank) / double(count);
    const double slack = 4 * std::sqrt(share * (1 - share) * kProbe) + 4;
    const int above = std::max(0, int(share * kProbe - slack));
    const int middle = std::min(kProbe - 1, int(share * kProbe));
    const int below = std::min(kProbe - 1, int(share * kProbe + slack));
    std::nth_element(probe, probe + middle, probe + kProbe, std::greater<uint32_t>());
    std::nth_element(probe, probe + above, probe + middle, std::greater<uint32_t>());
    std::nth_element(probe + middle, probe + below, probe + kProbe, std::greater<uint32_t>());
    const uint32_t pivot = probe[middle];
    const uint32_t high = above == 0 ? UINT32_MAX : probe[above] + 1;
    const uint32_t low = below == kProbe - 1 ? 0 : probe[below];
    uint64_t over = 0;
    uint64_t inside = kernels.partition(from, count, low, high, spare, &over);
    if (rank <= over || rank > over + inside) {  // missed: start from all keys, without guesses
      from = keys;
      count = all;
      rank = asked;
      break;
    }
    from = spare;
    rank -= over;
    if (high - low == 1) return low;
    if (inside > count / 2) {  // few distinct keys: go to the pivot's side of them
      uint64_t more = 0, least = 0;
      for (uint64_t j = 0; j < inside; ++j) {
        more += spare[j] > pivot;
        least += spare[j] >= pivot;
      }
      if (rank > more && rank <= least) return pivot;
      over = 0;
      if (rank <= more) {
        inside = kernels.partition(spare, inside, pivot + 1, UINT32_MAX, spare, &over);
      } else {
        inside = kernels.partition(spare, inside, 0, pivot, spare, &over);
        rank -= over;
      }
    }
    count = inside;
  }
  if (from != spare) std::copy(from, from + count, spare);
  std::nth_element(spare, spare + (rank - 1), spare + count, std::greater<uint32_t>());
  return spare[rank - 1];
}

void sample_brackets(const Context& ctx, const std::vector<Segment>& segments, int first, int count,
                     uint64_t total, const uint64_t* ranks, Bracket* brackets) {
  const size_t mark = ctx.scratch.mark();
  bool narrow = true;
  for (const Segment& segment : segments) {
    for (int j = 0; j < count; ++j) narrow &= size_of(segment.models[first + j].type) == 2;
  }
  const unsigned unit = narrow ? 64 : 32;  // 128 bytes
  // Units are drawn from the segments that can hold one, by position as if these were concatenated.
  std::vector<const Segment*> held;
  std::vector<uint64_t> ends;
  uint64_t length = 0;
  for (const Segment& segment : segments) {
    if (segment.n < unit) continue;
    held.push_back(&segment);
    ends.push_back(length += segment.n);
  }
  const int workers = std::min(ctx.threads, count);
  const uint64_t room = ctx.scratch.left() / sizeof(uint32_t) / uint64_t(count + 2 * workers) - 256;
  const uint64_t wish =
      uint64_t((narrow ? kSampleScale / 2 : kSampleScale) * std::pow(double(total), 2.0 / 3.0));
  const uint64_t units = std::min({wish, room, length}) / unit;
  if (units < 64) return;  // brackets that hold everything
  const uint64_t m = units * unit;
  uint32_t* keys = ctx.scratch.take<uint32_t>((m + 16) * uint64_t(count));
  const double step = double(length) / double(units);
  const auto place = [&](uint64_t u, const Segment*& segment) {  // stratified and jittered
    const uint64_t begin = uint64_t(double(u) * step), end = uint64_t(double(u + 1) * step);
    uint64_t at = begin + mix(u) % std::max<uint64_t>(1, end - begin);
    at = std::min(at, length - 1);
    const size_t s = size_t(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
    segment = held[s];
    at -= ends[s] - segment->n;
    return std::min(at, segment->n - unit) / unit *
           unit;  // as a rule on a boundary of two cache lines
  };
  constexpr uint64_t kUnitsATask = 256, kAhead = 8;
  parallel_for(ctx.threads, (units + kUnitsATask - 1) / kUnitsATask, [&](int, uint64_t task) {
    const Segment* segment = nullptr;
    const uint64_t begin = task * kUnitsATask, end = std::min(units, begin + kUnitsATask);
    const auto prefetch = [&](uint64_t u) {
      const Segment* its = nullptr;
      const uint64_t i = place(u, its);
      for (int j = -1; j < count; ++j) {
        const Buffer& buffer = j < 0 ? its->base : its->models[first + j];
        if (buffer.data == nullptr) continue;
        const char* p = static_cast<const char*>(buffer.at(i));
        for (unsigned offset = 0; offset < unit * size_of(buffer.type); offset += 64) {
          __builtin_prefetch(p + offset);
        }
      }
    };
    for (uint64_t u = begin; u < std::min(end, begin + kAhead); ++u) prefetch(u);
    for (uint64_t u = begin; u < end; ++u) {
      if (u + kAhead < end) prefetch(u + kAhead);
      const uint64_t i = place(u, segment);
      for (int j = 0; j < count; ++j) {
        if (ranks[j] == 0 || ranks[j] >= total) continue;
        uint32_t own[64 + 16];
        ctx.kernels.keys(segment->models[first + j], segment->base, i, unit, own);
        std::copy(own, own + unit, keys + uint64_t(j) * (m + 16) + u * unit);
      }
    }
  });
  uint32_t* parts = ctx.scratch.take<uint32_t>((2 * m + 64) * uint64_t(workers));
  std::vector<uint16_t> counts(units * size_t(workers));
  parallel_for(workers, uint64_t(count), [&](int thread, uint64_t j) {
    if (ranks[j] == 0 || ranks[j] >= total) return;
    uint32_t* part = parts + (2 * m + 64) * uint64_t(thread);
    brackets[j] = make_bracket(ctx.kernels, keys + j * (m + 16), units, unit,
                               double(ranks[j]) / double(total), part, part + m + 32,
                               counts.data() + units * size_t(thread));
  });
  ctx.scratch.release(mark);
}

template <>
std::vector<float> select<float>(const Context& ctx, const std::vector<Segment>& segments,
                                 const std::vector<uint64_t>& ranks) {
  const uint64_t total = total_of(segments);
  std::vector<uint32_t> keys(ranks.size());
  for (size_t first = 0; first < ranks.size(); first += kFusedModels) {
    const int count = int(std::min<size_t>(kFusedModels, ranks.size() - first));
    const bool any = std::any_of(ranks.begin() + long(first), ranks.begin() + long(first) + count,
                                 [&](uint64_t rank) { return rank > 0 && rank < total; });
    if (any)
      select_group(ctx, segments, int(first), count, total, ranks.data() + first,
                   keys.data() + first);
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
