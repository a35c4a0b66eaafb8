#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/threads.h"

namespace pymerge::cpu {
namespace {

constexpr unsigned kBlock = 1024;      // keys worked on at a time, in the L1 cache
constexpr uint64_t kDirect = 1 << 17;  // up to here all keys are computed and kept
// The sample is this times n^(2/3) keys. 16-bit types have heavy keys, for which half of it says as much.

constexpr double kSampleScale = 6;
constexpr double kSigmas = 3.5;
constexpr double kNearSigmas = 1.5;
constexpr uint64_t kCoarseUnits = 64;  // for the window that the sample is looked at through
constexpr double kWindowSigmas = 4.5;
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

// A sample of one model: its keys inside [low, high), and how many of all `size` are above.
struct Sample {
  const uint32_t* keys = nullptr;
  uint64_t inside = 0, above = 0, size = 0;
  uint32_t low = 0, high = 0;
  double sigma = 0;  // standard deviation of the number of keys above the threshold
};

// Where the rank-th largest key of a sample of `count` keys in units is, and how far the count of keys above it strays.
struct Coarse {
  uint32_t low = 0, middle = 0, high = kInfinityKey + 1;
};

// The standard deviation of a sum of counts of stratified units. Units differ more than independent elements would:
// their successive differences say by how much.
double deviation(const uint16_t* counts, uint64_t units) {
  double squares = 0;
  for (uint64_t u = 1; u < units; ++u) {
    const double step = double(counts[u]) - double(counts[u - 1]);
    squares += step * step;
  }
  return std::sqrt(squares / 2 / double(units - 1) * double(units));
}

// A window that holds the threshold, from a few units of keys; keys are reordered.
Coarse make_window(const Kernels& kernels, uint32_t* keys, uint64_t units, unsigned unit,
                   double share) {
  const uint64_t count = units * unit;
  const auto nth = [&](uint64_t rank) {
    std::nth_element(keys, keys + (rank - 1), keys + count, std::greater<uint32_t>());
    return keys[rank - 1];
  };
  std::vector<uint32_t> in_order(keys, keys + count);
  const double target = share * double(count);
  Coarse coarse;
  coarse.middle = nth(std::clamp<uint64_t>(uint64_t(std::ceil(target)), 1, count));
  uint16_t counts[kCoarseUnits];
  kernels.count_units(in_order.data(), units, unit, coarse.middle, counts);
  const double reach = kWindowSigmas * deviation(counts, units) + 4;
  if (target - reach >= 1) coarse.high = nth(uint64_t(target - reach)) + 1;
  if (target + reach < double(count)) coarse.low = nth(uint64_t(target + reach) + 1);
  return coarse;
}

// The bracket of one rank, `share` of all; not sampled where the sample's window does not hold it.
Bracket make_bracket(const Kernels& kernels, const Sample& sample, double share, uint32_t* spare) {
  const uint64_t m = sample.size;
  const double target = share * double(m);
  Bracket bracket;
  bool known = true;
  const auto nth = [&](uint64_t rank) -> uint32_t {
    if (rank > sample.above && rank <= sample.above + sample.inside)
      return nth_key(kernels, sample.keys, sample.inside, rank - sample.above, spare);
    known = false;
    return sample.low;
  };
  uint64_t above = 0;
  const auto inside = [&](uint32_t low, uint32_t high) {
    known &= low >= sample.low && high <= sample.high;
    above = sample.above;
    return double(kernels.count(sample.keys, sample.inside, low, high, &above));
  };
  const double reach = kSigmas * sample.sigma + 2;
  bracket.high = target - reach < 1 ? sample.high : nth(uint64_t(target - reach)) + 1;
  bracket.low = target + reach >= double(m) ? sample.low : nth(uint64_t(target + reach) + 1);
  known &= target - reach >= 1 || sample.high > kInfinityKey;
  known &= target + reach < double(m) || sample.low == 0;
  if (!known) return Bracket();
  // The others are between these.
  Sample part = sample;
  part.inside =
      kernels.partition(sample.keys, sample.inside, bracket.low, bracket.high, spare, &part.above);
  part.keys = spare;
  spare += (part.inside + 31) & ~uint64_t(15);
  const auto nth_of_part = [&](double rank) {
    return nth_key(kernels, part.keys, part.inside, uint64_t(rank) - part.above, spare);
  };
  bracket.guess = nth_of_part(std::clamp(std::ceil(target), 1.0, double(m)));
  const double close = kNearSigmas / kSigmas * reach;
  bracket.near_high = target - close < 1 ? bracket.high : nth_of_part(target - close) + 1;
  bracket.near_low = target + close >= double(m) ? bracket.low : nth_of_part(target + close) + 1;
  // Distinct keys fill a bracket to twice the reach; half as much again says that there are heavy ones.
  const double limit = std::max(kMostInside * double(m), 3 * reach);
  bracket.sampled = true;
  if (double(part.inside) <= limit) return bracket;
  // Heavy keys. Without the one at an edge it may do.
  const uint32_t outer_low = bracket.low, outer_high = bracket.high;
  if (bracket.low != bracket.guess && inside(bracket.low, bracket.low + 1) > limit / 4) {
    bracket.below = {bracket.low, bracket.low, bracket.low + 1};
    ++bracket.low;
  }
  if (bracket.high - 1 != bracket.guess && inside(bracket.high - 1, bracket.high) > limit / 4) {
    --bracket.high;
    bracket.above = {bracket.high, bracket.high, bracket.high + 1};
  }
  if (inside(bracket.low, bracket.high) <= limit) return bracket;
  bracket.low = bracket.guess;
  bracket.high = bracket.guess + 1;
  const uint64_t equal = uint64_t(inside(bracket.low, bracket.high));
  const uint64_t over = above;
  // The sides, as far as the window shows them: without, a miss is answered by other means.
  const auto side = [&](uint32_t next, uint32_t low, uint32_t high) {
    const bool few = inside(low, high) <= limit;
    const Bracket::Side found =
        few ? Bracket::Side{next, low, high} : Bracket::Side{next, next, next + 1};
    return known ? found : Bracket::Side();
  };
  bracket.above = bracket.below = Bracket::Side();
  if (over > 0) {
    const uint32_t next = nth(over);
    bracket.above = side(next, bracket.guess + 1, std::max(outer_high, next + 1));
  }
  known = true;
  if (over + equal < m) {
    const uint32_t next = nth(over + equal + 1);
    bracket.below = side(next, std::min(outer_low, next), bracket.guess);
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
  const uint64_t units = std::min({wish, room, length}) / (unit + 1);
  if (units < kCoarseUnits) return;  // brackets that hold everything
  const auto skipped = [&](int j) { return ranks[j] == 0 || ranks[j] >= total; };
  // The place of the u-th of `all` units: stratified and jittered, as a rule on a boundary of two cache lines.
  const auto place = [&](uint64_t u, double stratum, const Segment*& segment) {
    const uint64_t begin = uint64_t(double(u) * stratum), end = uint64_t(double(u + 1) * stratum);
    const uint64_t jitter = uint64_t((mix(u) >> 32) * (end - begin)) >> 32;
    uint64_t at = std::min(begin + jitter, length - 1);
    const size_t s = held.size() == 1
                         ? 0
                         : size_t(std::upper_bound(ends.begin(), ends.end(), at) - ends.begin());
    segment = held[s];
    at -= ends[s] - segment->n;
    return std::min(at, segment->n - unit) & ~uint64_t(unit - 1);
  };

  Coarse windows[kFusedModels];
  parallel_for(workers, uint64_t(count), [&](int, uint64_t j) {
    if (skipped(int(j))) return;
    uint32_t keys[kCoarseUnits * 64 + 16];
    for (uint64_t u = 0; u < kCoarseUnits; ++u) {
      const Segment* segment = nullptr;
      const uint64_t i = place(u, double(length) / double(kCoarseUnits), segment);
      ctx.kernels.keys(segment->models[first + int(j)], segment->base, i, unit, keys + u * unit);
    }
    windows[j] =
        make_window(ctx.kernels, keys, kCoarseUnits, unit, double(ranks[j]) / double(total));
  });

  // A task's keys inside the window go to its own part of the model's room.
  const double stratum = double(length) / double(units);
  constexpr uint64_t kUnitsATask = 256, kBatch = 8;
  const uint64_t tasks = (units + kUnitsATask - 1) / kUnitsATask, part = kUnitsATask * unit + 16;
  uint32_t* keys = ctx.scratch.take<uint32_t>(tasks * part * uint64_t(count));
  struct Found {
    uint64_t inside = 0, above = 0;
  };
  std::vector<Found> found(tasks * size_t(count));
  std::vector<uint16_t> counts(units * size_t(count));
  parallel_for(ctx.threads, tasks, [&](int, uint64_t task) {
    const uint64_t begin = task * kUnitsATask, end = std::min(units, begin + kUnitsATask);
    const Segment* segments_of[2][kBatch];
    uint64_t places[2][kBatch];
    const auto look_up = [&](uint64_t u, int turn) {
      for (uint64_t v = 0; v < kBatch && u + v < end; ++v) {
        const Segment*& its = segments_of[turn][v];
        const uint64_t i = places[turn][v] = place(u + v, stratum, its);
        for (int j = -1; j < count; ++j) {
          const Buffer& buffer = j < 0 ? its->base : its->models[first + j];
          if (buffer.data == nullptr) continue;
          const char* p = static_cast<const char*>(buffer.at(i));
          for (unsigned offset = 0; offset < unit * size_of(buffer.type); offset += 64)
            __builtin_prefetch(p + offset);
        }
      }
    };
    look_up(begin, 0);
    int turn = 0;
    for (uint64_t u = begin; u < end; u += kBatch, turn = 1 - turn) {
      const uint64_t batch = std::min(kBatch, end - u);
      look_up(u + kBatch, 1 - turn);
      for (int j = 0; j < count; ++j) {
        if (skipped(j)) continue;
        uint32_t own[kBatch * 64 + 16];
        for (uint64_t v = 0; v < batch; ++v) {
          const Segment* segment = segments_of[turn][v];
          ctx.kernels.keys(segment->models[first + j], segment->base, places[turn][v], unit,
                           own + v * unit);
        }
        Found& to = found[task * uint64_t(count) + uint64_t(j)];
        uint32_t* list = keys + (uint64_t(j) * tasks + task) * part + to.inside;
        to.inside += ctx.kernels.partition(own, batch * unit, windows[j].low, windows[j].high, list,
                                           &to.above);
        ctx.kernels.count_units(own, batch, unit, windows[j].middle,
                                counts.data() + uint64_t(j) * units + u);
      }
    }
  });
  uint32_t* spares = ctx.scratch.take<uint32_t>((2 * units * unit + 64) * uint64_t(workers));
  parallel_for(workers, uint64_t(count), [&](int thread, uint64_t j) {
    if (skipped(int(j))) return;
    Sample sample;
    uint32_t* joined = keys + j * tasks * part;
    sample.keys = joined;
    for (uint64_t task = 0; task < tasks; ++task) {
      const Found& its = found[task * uint64_t(count) + j];
      std::memmove(joined + sample.inside, joined + task * part, its.inside * sizeof(uint32_t));
      sample.inside += its.inside;
      sample.above += its.above;
    }
    sample.size = units * unit;
    sample.low = windows[j].low;
    sample.high = windows[j].high;
    sample.sigma = deviation(counts.data() + j * units, units);
    brackets[j] = make_bracket(ctx.kernels, sample, double(ranks[j]) / double(total),
                               spares + (2 * units * unit + 64) * uint64_t(thread));
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
