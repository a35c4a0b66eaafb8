// Brackets from a sample (select.h): units of neighbouring keys, stratified and jittered over the
// tensor. A few units come first: they give the window through which all are looked at, so that
// only the keys near the threshold are kept, or settle a threshold that is safely inside an atom.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "cpu/core/threads.h"
#include "cpu/ties/order.h"
#include "cpu/ties/select.h"

namespace pymerge::cpu {
namespace {

// The sample is this times n^(2/3) keys: for brackets that four stages refine, or three; for those
// that are not refined; and for 16-bit types, whose keys are heavy.
constexpr double kFourStagesScale = 0.75, kThreeStagesScale = 2, kOneStageScale = 6,
                 kNarrowScale = 1;
constexpr double kSigmas = 3.5;        // half the width of a bracket, in standard deviations
constexpr double kNearSigmas = 1.5;    // the likelier part of it
constexpr uint64_t kCoarseUnits = 64;  // for the window that the sample is looked at through
constexpr unsigned kMostUnit = 64;     // keys a unit
constexpr double kWindowSigmas = 4.5;
constexpr double kMostInside = 0.008;  // of all elements, in a bracket that is collected
constexpr int kMostAtoms = 4;          // heavy keys that a bracket is parted at

// A sample of one model: its keys inside [low, high), and how many of all `size` are above.
struct Sample {
  const uint32_t* keys = nullptr;
  uint64_t inside = 0, above = 0, size = 0;
  uint32_t low = 0, high = 0;
  double sigma = 0;  // standard deviation of the number of keys above the threshold
};

// What a few units say of a threshold: it is in [low, high), about `middle`. Settled where it is
// safely inside the atom at `middle`; `over` and `under` are the next keys that were seen, or
// `middle`.
struct Coarse {
  uint32_t low = 0, middle = 0, high = kInfinityKey + 1;
  bool settled = false;
  uint32_t over = 0, under = 0;
};

// The standard deviation of a sum of counts of stratified units. Units differ more than independent
// elements would: their successive differences say by how much.
double deviation(const uint16_t* counts, uint64_t units) {
  double squares = 0;
  for (uint64_t u = 1; u < units; ++u) {
    const double step = double(counts[u]) - double(counts[u - 1]);
    squares += step * step;
  }
  return std::sqrt(squares / 2 / double(units - 1) * double(units));
}

// A window that holds the threshold, from a few units of keys.
Coarse make_window(const Kernels& kernels, const uint32_t* keys, uint64_t units, unsigned unit,
                   double share) {
  const uint64_t count = units * unit;
  uint32_t spare[kCoarseUnits * kMostUnit + 16];
  const Order order(kernels, keys, count, 0, kInfinityKey + 1, spare);
  const double target = share * double(count);
  Coarse coarse;
  coarse.middle = order.nth(std::clamp<uint64_t>(uint64_t(std::ceil(target)), 1, count));
  uint16_t through[kCoarseUnits], over[kCoarseUnits];
  kernels.count_units(keys, units, unit, coarse.middle, through);
  kernels.count_units(keys, units, unit, coarse.middle + 1, over);
  const double sigma = std::max(deviation(through, units), deviation(over, units));
  const double reach = kWindowSigmas * sigma + 4;
  uint64_t above = 0;
  const uint64_t equal = kernels.count(keys, count, coarse.middle, coarse.middle + 1, &above);
  // The counts of keys above the atom and through it stray as well, and no more than this.
  const double stray = 2 * reach;
  if (target - stray > double(above) && target + stray < double(above + equal)) {
    coarse.settled = true;
    coarse.over = above > 0 ? order.nth(above) : coarse.middle;
    coarse.under = above + equal < count ? order.nth(above + equal + 1) : coarse.middle;
    return coarse;
  }
  if (target - reach >= 1) coarse.high = order.nth(uint64_t(target - reach)) + 1;
  if (target + reach < double(count)) coarse.low = order.nth(uint64_t(target + reach) + 1);
  return coarse;
}

// A key of [low, high) that no other is much heavier than. spare: as for Order.
uint32_t heaviest(const Kernels& kernels, const Sample& sample, uint32_t low, uint32_t high,
                  uint32_t* spare) {
  constexpr unsigned kBits = 10;
  // A key that shares its cell with others wins it where it is most of them.
  struct Cell {
    uint32_t key = 0, count = 0;
  };
  Cell cells[1 << kBits];
  uint64_t above = 0;
  const uint64_t count = kernels.partition(sample.keys, sample.inside, low, high, spare, &above);
  for (uint64_t j = 0; j < count; ++j) {
    Cell& cell = cells[spare[j] * 0x9e3779b1u >> (32 - kBits)];
    if (cell.count == 0) cell.key = spare[j];
    cell.count += cell.key == spare[j] ? 1 : -1;
  }
  const Cell* best =
      std::max_element(std::begin(cells), std::end(cells),
                       [](const Cell& a, const Cell& b) { return a.count < b.count; });
  return best->count > 0 ? best->key : low;
}

// The bracket of one rank, `share` of all; not sampled where the sample's window does not hold it.
Bracket make_bracket(const Kernels& kernels, const Sample& sample, double share, uint32_t* spare) {
  const uint64_t m = sample.size;
  const double target = share * double(m);
  Bracket bracket;
  bool known = true;
  const Order order(kernels, sample.keys, sample.inside, sample.low, sample.high, spare);
  const auto nth = [&](uint64_t rank) -> uint32_t {
    if (rank > sample.above && rank <= sample.above + sample.inside)
      return order.nth(rank - sample.above);
    known = false;
    return sample.low;
  };
  uint64_t above = 0;
  const auto inside = [&](uint32_t low, uint32_t high) {
    known &= low >= sample.low && high <= sample.high;
    above = sample.above;
    return double(kernels.count(sample.keys, sample.inside, low, high, &above));
  };
  const double reach = kSigmas * sample.sigma + 2, close = kNearSigmas / kSigmas * reach;
  const double first = double(sample.above + 1), last = double(sample.above + sample.inside);
  if (std::ceil(target) < first || std::ceil(target) > last) return Bracket();
  const auto over = [&](double by) {  // an edge that the window does not show is the window's
    return target - by < first ? sample.high : nth(uint64_t(target - by)) + 1;
  };
  const auto under = [&](double by) {
    return target + by + 1 > last ? sample.low : nth(uint64_t(target + by + 1));
  };
  bracket.high = over(reach);
  bracket.low = under(reach);
  bracket.near_high = over(close);
  bracket.near_low = under(close);
  bracket.estimate = nth(uint64_t(std::ceil(target)));
  // Distinct keys fill a bracket to twice the reach; half as much again says that there are heavy
  // ones.
  const double limit = std::max(kMostInside * double(m), 3 * reach);
  bracket.sampled = true;
  if (inside(bracket.low, bracket.high) <= limit) return bracket;
  // Heavy keys: one after the other parts the bracket, until what is left is light or one of them.
  uint32_t low = bracket.low, high = bracket.high;
  const auto light = [&](uint32_t from, uint32_t to) {
    return from < to && inside(from, to) <= limit;
  };
  const auto alone = [](uint32_t key) { return Bracket::Side{key, key, key + 1, false}; };
  for (int turn = 0; turn < kMostAtoms; ++turn) {
    const uint32_t atom = heaviest(kernels, sample, low, high, spare);
    const double equal = inside(atom, atom + 1), greater = double(above);
    if (target <= greater) {
      bracket.below = light(low, atom) ? Bracket::Side{atom, low, atom + 1, true} : alone(atom);
      low = atom + 1;
    } else if (target > greater + equal &&
               (!light(low, atom) || target - close > greater + equal)) {
      bracket.above = light(low, atom) ? Bracket::Side{atom, low, atom + 1, true} : alone(atom);
      high = atom;
    } else {
      bracket.estimate = atom;
      // What lies below it is collected down to the next heavy key.
      for (int left = kMostAtoms; left > 0 && low < atom && !light(low, atom); --left) {
        const uint32_t next = heaviest(kernels, sample, low, atom, spare);
        bracket.below = light(low, next) ? Bracket::Side{next, low, next + 1, true} : alone(next);
        low = next + 1;
      }
      bracket.atom = light(low, atom);
      if (!bracket.atom) {
        bracket.below = Bracket::Side();
        const uint32_t next =
            greater + equal < double(m) ? nth(uint64_t(greater + equal) + 1) : atom;
        if (known && next < atom) bracket.below = alone(next);
        low = atom;
      }
      known = true;
      const uint32_t next = greater > 0 ? nth(uint64_t(greater)) : atom;
      if (known && next > atom && next < high) {  // up to the next heavy key, or the end
        bool heavy = bracket.above.high != 0;
        for (int left = kMostAtoms; left > 0 && high > atom + 1 && !light(atom + 1, high); --left) {
          high = heaviest(kernels, sample, atom + 1, high, spare);
          heavy = true;
        }
        bracket.above = !light(atom + 1, high) ? alone(next)
                        : heavy                ? Bracket::Side{high, atom + 1, high + 1, true}
                                               : Bracket::Side{next, atom + 1, high, false};
      } else if (known && next > atom && bracket.above.high == 0) {
        bracket.above = alone(next);
      }
      known = true;
      high = atom + 1;
      break;
    }
    if (light(low, high)) break;
  }
  if (!bracket.atom && bracket.estimate + 1 != high && !light(low, high)) {
    low = bracket.estimate;
    high = low + 1;
  }
  bracket.low = low;
  bracket.high = high;
  bracket.near_high = std::clamp(bracket.near_high, low, bracket.collected_high());
  bracket.near_low = std::clamp(bracket.near_low, low, bracket.near_high);
  return bracket;
}

}  // namespace

void sample_brackets(const Context& ctx, const std::vector<Segment>& segments, int first, int count,
                     uint64_t total, const uint64_t* ranks, int stages, Bracket* brackets) {
  const size_t mark = ctx.scratch.mark();
  bool narrow = true;
  for (const Segment& segment : segments) {
    for (int j = 0; j < count; ++j)
      narrow &= has_heavy_keys(segment.models[first + j], segment.base);
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
  const uint64_t room = ctx.scratch.left() / sizeof(uint32_t) / uint64_t(count + workers) - 256;
  const double scale = narrow        ? kNarrowScale
                       : stages == 4 ? kFourStagesScale
                       : stages == 3 ? kThreeStagesScale
                                     : kOneStageScale;
  // Of more ranks than that the brackets are half as wide, or their lists would have no room.
  const double more = std::max(1.0, double(count) / kSampledModels);
  const uint64_t wish = std::max(uint64_t(scale * more * more * std::pow(double(total), 2.0 / 3.0)),
                                 2 * kCoarseUnits * (unit + 1));
  const uint64_t units = std::min({wish, room, length}) / (unit + 1);
  if (units < kCoarseUnits) return;  // brackets that hold everything
  Coarse windows[kSampledBounds];
  const auto skipped = [&](int j) {
    return ranks[j] == 0 || ranks[j] >= total || windows[j].settled;
  };
  // The place of the u-th of `all` units: stratified and jittered, as a rule on a boundary of two
  // cache lines.
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

  parallel_for(workers, uint64_t(count), [&](int, uint64_t j) {
    if (skipped(int(j))) return;
    uint32_t keys[kCoarseUnits * kMostUnit + 16];
    for (uint64_t u = 0; u < kCoarseUnits; ++u) {
      const Segment* segment = nullptr;
      const uint64_t i = place(u, double(length) / double(kCoarseUnits), segment);
      segment->keys(ctx.kernels, first + int(j), i, unit, keys + u * unit);
    }
    windows[j] =
        make_window(ctx.kernels, keys, kCoarseUnits, unit, double(ranks[j]) / double(total));
    const Coarse& window = windows[j];
    if (!window.settled) return;
    Bracket& bracket = brackets[j];
    bracket.sampled = true;
    bracket.estimate = bracket.low = window.middle;
    bracket.high = window.middle + 1;
    const auto side = [&](uint32_t key) {
      return key != window.middle ? Bracket::Side{key, key, key + 1, false} : Bracket::Side();
    };
    bracket.above = side(window.over);
    bracket.below = side(window.under);
  });
  bool settled = true;
  for (int j = 0; j < count; ++j) settled &= skipped(j);
  if (settled) {
    ctx.scratch.release(mark);
    return;
  }

  // A task's keys inside the window go to its own part of the model's room.
  const double stratum = double(length) / double(units);
  constexpr uint64_t kUnitsATask = 256, kBatch = 16;
  const uint64_t tasks = (units + kUnitsATask - 1) / kUnitsATask, part = kUnitsATask * unit + 16;
  uint32_t* keys = ctx.scratch.take<uint32_t>(tasks * part * uint64_t(count));
  struct Found {
    uint64_t inside = 0, above = 0;
  };
  std::vector<Found> found(tasks * size_t(count));
  std::vector<uint16_t> counts(2 * units * size_t(count));  // through `middle` and above it
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
            __builtin_prefetch(p + offset, 0, 2);
        }
      }
    };
    look_up(begin, 0);
    int turn = 0;
    for (uint64_t u = begin; u < end; u += kBatch, turn = 1 - turn) {
      const uint64_t batch = std::min(kBatch, end - u);
      look_up(u + kBatch, 1 - turn);
      uint32_t own[kBatch * kMostUnit + 16];
      int of = -1;  // whose keys these are
      for (int j = 0; j < count; ++j) {
        if (skipped(j)) continue;
        // Two ranks of one model, one behind the other, take the same keys.
        if (of < 0 || held.size() > 1 || !held[0]->same_keys(first + j, first + of)) {
          for (uint64_t v = 0; v < batch; ++v) {
            const Segment* segment = segments_of[turn][v];
            segment->keys(ctx.kernels, first + j, places[turn][v], unit, own + v * unit);
          }
          of = j;
        }
        Found& to = found[task * uint64_t(count) + uint64_t(j)];
        uint32_t* list = keys + (uint64_t(j) * tasks + task) * part + to.inside;
        to.inside += ctx.kernels.partition(own, batch * unit, windows[j].low, windows[j].high, list,
                                           &to.above);
        uint16_t* through = counts.data() + 2 * uint64_t(j) * units + u;
        ctx.kernels.count_units(own, batch, unit, windows[j].middle, through);
        ctx.kernels.count_units(own, batch, unit, windows[j].middle + 1, through + units);
      }
    }
  });
  uint32_t* spares = ctx.scratch.take<uint32_t>((units * unit + 64) * uint64_t(workers));
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
    const uint16_t* through = counts.data() + 2 * j * units;
    sample.sigma = std::max(deviation(through, units), deviation(through + units, units));
    brackets[j] = make_bracket(ctx.kernels, sample, double(ranks[j]) / double(total),
                               spares + (units * unit + 64) * uint64_t(thread));
  });
  ctx.scratch.release(mark);
}

}  // namespace pymerge::cpu
