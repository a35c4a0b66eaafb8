#include "cpu/ties/magprune.h"

#include <algorithm>
#include <array>

#include "common/key.h"

namespace pymerge::cpu {
namespace {

// T3: an element is kept iff its random word is below this, 2^32 for a probability of 1.
uint64_t cutoff_of(double density, double epsilon, uint64_t less, uint64_t equal, uint64_t length) {
  // The mean of the ranks that equal magnitudes share; a row of one has the middle one.
  const double rank = double(less) + double(equal - 1) / 2;
  const double place = length > 1 ? rank / double(length - 1) : 0.5;
  return random_cutoff((density - epsilon) + place * (2 * epsilon));
}

// A magnitude and whose it is.
template <class Work>
struct Entry {
  Key<Work> key;
  uint64_t at;
  bool operator<(const Entry& other) const { return key < other.key; }
};

// One thread's room.
template <class Work>
struct Room {
  std::vector<Work> deltas;
  std::vector<uint32_t> words;
  std::vector<Entry<Work>> entries;
  std::vector<uint64_t> packed, spare;  // binary32: key and place in one number
};

// Orders numbers by their upper 32 bits, of which the highest is 0: three digits of 11 bits, from
// the lowest. Rows of less than a few hundred cost more to count than to compare.
void order(std::vector<uint64_t>& items, std::vector<uint64_t>& spare, uint64_t count) {
  constexpr unsigned kBits = 11, kBins = 1u << kBits;
  if (count < 512) {
    std::sort(items.begin(), items.begin() + long(count));
    return;
  }
  std::array<std::array<uint32_t, kBins>, 3> bins = {};
  for (uint64_t j = 0; j < count; ++j) {
    const uint32_t key = uint32_t(items[j] >> 32);
    ++bins[0][key & (kBins - 1)];
    ++bins[1][key >> kBits & (kBins - 1)];
    ++bins[2][key >> 2 * kBits];
  }
  for (unsigned digit = 0; digit < 3; ++digit) {
    const unsigned shift = 32 + kBits * digit;
    auto& starts = bins[digit];
    if (starts[items[0] >> shift & (kBins - 1)] == count) continue;  // all of them have this digit
    uint32_t sum = 0;
    for (uint32_t& bin : starts) {
      const uint32_t own = bin;
      bin = sum;
      sum += own;
    }
    for (uint64_t j = 0; j < count; ++j) {
      spare[starts[items[j] >> shift & (kBins - 1)]++] = items[j];
    }
    items.swap(spare);
  }
}

template <class Work>
class Draw {
 public:
  Draw(const Plan<Work>& plan, Rows rows, uint64_t begin, uint64_t end)
      : plan_(plan), rows_(rows), begin_(begin), end_(end) {}

  // The row of model k whose first element is `first`.
  void row(Room<Work>& room, int k, double density, double epsilon, uint64_t first,
           uint64_t* bits) const {
    const uint64_t length = rows_.length;
    read(room, k, first);
    word(room, k, first);
    const auto decide = [&](uint64_t at, uint64_t cutoff) {
      const uint64_t i = first + at * rows_.step;
      if (room.words[at] >= cutoff || i < begin_ || i >= end_) return;
      // Rows of other threads share words.
      __atomic_fetch_or(bits + (i - begin_) / 64, uint64_t(1) << (i - begin_) % 64,
                        __ATOMIC_RELAXED);
    };
    if (sizeof(Work) == 4 && length < uint64_t(1) << 32) {
      room.packed.resize(length);
      room.spare.resize(length);
      for (uint64_t at = 0; at < length; ++at) {
        room.packed[at] = uint64_t(magnitude_key(room.deltas[at])) << 32 | at;
      }
      order(room.packed, room.spare, length);
      const auto key = [&](uint64_t j) { return room.packed[j] >> 32; };
      const auto place = [&](uint64_t j) { return room.packed[j] & 0xffffffffu; };
      groups(density, epsilon, key, place, decide);
      return;
    }
    room.entries.resize(length);
    for (uint64_t at = 0; at < length; ++at)
      room.entries[at] = {magnitude_key(room.deltas[at]), at};
    std::sort(room.entries.begin(), room.entries.end());
    const auto key = [&](uint64_t j) { return room.entries[j].key; };
    const auto place = [&](uint64_t j) { return room.entries[j].at; };
    groups(density, epsilon, key, place, decide);
  }

 private:
  void read(Room<Work>& room, int k, uint64_t first) const {
    room.deltas.resize(rows_.length);
    for (uint64_t at = 0; at < rows_.length; ++at) {
      const uint64_t i = first + at * rows_.step;
      room.deltas[at] = delta_at(plan_, k, base_at(plan_, i), i);
    }
  }

  void word(Room<Work>& room, int k, uint64_t first) const {
    room.words.resize(rows_.length);
    PhiloxBlock block = {};
    uint64_t held = UINT64_MAX;
    for (uint64_t at = 0; at < rows_.length; ++at) {
      const uint64_t i = plan_.first + first + at * rows_.step;
      if (i >> 2 != held) block = philox(held = i >> 2, uint32_t(k), plan_.key);
      room.words[at] = block.word[i & 3];
    }
  }

  // Places in ascending order of their keys, those of equal keys together.
  template <class KeyAt, class Place, class Decide>
  void groups(double density, double epsilon, const KeyAt& key, const Place& place,
              const Decide& decide) const {
    for (uint64_t less = 0; less < rows_.length;) {
      uint64_t through = less + 1;
      while (through < rows_.length && key(through) == key(less)) ++through;
      const uint64_t cutoff = cutoff_of(density, epsilon, less, through - less, rows_.length);
      for (; less < through; ++less) decide(place(less), cutoff);
    }
  }

  const Plan<Work>& plan_;
  Rows rows_;
  uint64_t begin_, end_;
};

}  // namespace

template <class Work>
void draw_magprune(const Context& ctx, const Plan<Work>& plan, Rows rows,
                   const std::vector<double>& densities, const std::vector<double>& epsilons,
                   uint64_t begin, uint64_t end, uint64_t* bits, uint64_t stride) {
  const uint64_t unit = rows.length * rows.step, models = uint64_t(plan.count);
  for (uint64_t k = 0; k < models; ++k) {
    const uint64_t all = densities[k] >= 1 ? ~uint64_t(0) : 0;
    std::fill(bits + k * stride, bits + (k + 1) * stride, all);
  }
  const uint64_t first = begin / unit, units = (end + unit - 1) / unit - first;
  // Some rows a task, so that a task is worth its hand-out.
  const uint64_t some = std::max<uint64_t>(1, (uint64_t(1) << 15) / unit);
  const uint64_t tasks = (units + some - 1) / some;
  const Draw<Work> draw(plan, rows, begin, end);
  std::vector<Room<Work>> rooms(static_cast<size_t>(ctx.threads));
  parallel_for(ctx.threads, tasks * models, [&](int thread, uint64_t task) {
    const uint64_t k = task / tasks, from = task % tasks * some;
    if (densities[k] >= 1 || densities[k] <= 0) return;
    for (uint64_t u = from; u < std::min(units, from + some); ++u) {
      for (uint64_t row = 0; row < rows.step; ++row) {
        draw.row(rooms[size_t(thread)], int(k), densities[k], epsilons[k], (first + u) * unit + row,
                 bits + k * stride);
      }
    }
  });
}

template void draw_magprune<float>(const Context&, const Plan<float>&, Rows,
                                   const std::vector<double>&, const std::vector<double>&, uint64_t,
                                   uint64_t, uint64_t*, uint64_t);
template void draw_magprune<double>(const Context&, const Plan<double>&, Rows,
                                    const std::vector<double>&, const std::vector<double>&,
                                    uint64_t, uint64_t, uint64_t*, uint64_t);

}  // namespace pymerge::cpu
