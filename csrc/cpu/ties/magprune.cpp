#include "cpu/ties/magprune.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "common/key.h"

namespace pymerge::cpu {
namespace {

// T3: an element is kept iff its random word is below this, 2^32 for a probability of 1.
uint64_t cutoff_of(double density, double epsilon, double place) {
  return random_cutoff((density - epsilon) + place * (2 * epsilon));
}

// The place of equal magnitudes in their row, from 0 for the smallest to 1: that of their mean
// rank.
double place_of(uint64_t less, uint64_t equal, uint64_t length) {
  const double rank = double(less) + double(equal - 1) / 2;
  return length > 1 ? rank / double(length - 1) : 0.5;
}

constexpr uint32_t kBins = 1024;   // of a row's magnitudes
constexpr uint64_t kFew = 64;      // elements of a row that are as well sorted
constexpr uint64_t kLookUps = 64;  // keys looked at an element, beyond which sorting is faster

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
  std::vector<Key<Work>> keys;
  std::vector<uint32_t> words;
  std::vector<uint8_t> kept;
  std::vector<Entry<Work>> entries;
  std::vector<uint64_t> packed, spare;  // binary32: key and place in one number
  std::vector<uint32_t> by_bin, open;
  uint32_t begin[kBins + 1], fill[kBins];
  uint64_t least[kBins], most[kBins];
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
  Draw(const Context& ctx, const Plan<Work>& plan, Rows rows, uint64_t begin, uint64_t end)
      : ctx_(ctx), plan_(plan), rows_(rows), begin_(begin), end_(end) {}

  // The row of model k whose first element is `first`.
  void row(Room<Work>& room, int k, double density, double epsilon, uint64_t first,
           uint64_t* bits) const {
    const uint64_t length = rows_.length;
    read(room, k, first);
    word(room, k, first);
    room.kept.assign(length, 0);
    const auto decide = [&](const auto& key, const auto& place) {
      groups(room, density, epsilon, key, place);
    };
    if constexpr (std::is_same_v<Work, float>) {
      if (length >= kFew && length < uint64_t(1) << 32 && by_bins(room, density, epsilon)) {
        write(room.kept, first, bits);
        return;
      }
    }
    if (sizeof(Work) == 4 && length < uint64_t(1) << 32) {
      room.packed.resize(length);
      room.spare.resize(length);
      for (uint64_t at = 0; at < length; ++at) room.packed[at] = uint64_t(room.keys[at]) << 32 | at;
      order(room.packed, room.spare, length);
      decide([&](uint64_t j) { return room.packed[j] >> 32; },
             [&](uint64_t j) { return room.packed[j] & 0xffffffffu; });
    } else {
      room.entries.resize(length);
      for (uint64_t at = 0; at < length; ++at) room.entries[at] = {room.keys[at], at};
      std::sort(room.entries.begin(), room.entries.end());
      decide([&](uint64_t j) { return room.entries[j].key; },
             [&](uint64_t j) { return room.entries[j].at; });
    }
    write(room.kept, first, bits);
  }

 private:
  void read(Room<Work>& room, int k, uint64_t first) const {
    room.keys.resize(rows_.length + 16);
    if constexpr (std::is_same_v<Work, float>) {
      if (rows_.step == 1) {
        ctx_.kernels.keys(plan_.models[k], plan_.base, first, rows_.length, room.keys.data());
        return;
      }
    }
    for (uint64_t at = 0; at < rows_.length; ++at) {
      const uint64_t i = first + at * rows_.step;
      room.keys[at] = magnitude_key(delta_at(plan_, k, base_at(plan_, i), i));
    }
  }

  void word(Room<Work>& room, int k, uint64_t first) const {
    room.words.resize(rows_.length + 4);
    const uint64_t start = plan_.first + first;
    if (rows_.step == 1 && start % 4 == 0) {
      ctx_.kernels.words(start, rows_.length, uint32_t(k), plan_.key, room.words.data());
      return;
    }
    PhiloxBlock block = {};
    uint64_t held = UINT64_MAX;
    for (uint64_t at = 0; at < rows_.length; ++at) {
      const uint64_t i = plan_.first + first + at * rows_.step;
      if (i >> 2 != held) block = philox(held = i >> 2, uint32_t(k), plan_.key);
      room.words[at] = block.word[i & 3];
    }
  }

  // Without order, from a histogram: a bin bounds the ranks of its elements, and those decide all
  // but the few whose word is between the cutoffs of the bin's first and last rank. These look up
  // the rest of their bin. False where that is too much to look at.
  bool by_bins(Room<Work>& room, double density, double epsilon) const {
    const uint64_t length = rows_.length;
    const auto* keys = room.keys.data();
    Key<Work> low = keys[0], high = keys[0];
    for (uint64_t at = 0; at < length; ++at) {
      low = std::min(low, keys[at]);
      high = std::max(high, keys[at]);
    }
    unsigned shift = 0;
    while ((high - low) >> shift >= kBins) ++shift;
    std::fill(room.fill, room.fill + kBins, 0);
    for (uint64_t at = 0; at < length; ++at) ++room.fill[(keys[at] - low) >> shift];
    uint32_t below = 0;
    for (uint32_t bin = 0; bin < kBins; ++bin) {
      const uint32_t count = room.fill[bin];
      room.begin[bin] = room.fill[bin] = below;
      if (count == 0) continue;
      room.least[bin] = cutoff_of(density, epsilon, place_of(below, 1, length));
      below += count;
      room.most[bin] = cutoff_of(density, epsilon, place_of(below - 1, 1, length));
    }
    room.begin[kBins] = below;
    room.by_bin.resize(length);
    for (uint64_t at = 0; at < length; ++at)
      room.by_bin[room.fill[(keys[at] - low) >> shift]++] = keys[at];
    for (uint32_t bin = 0; bin < kBins; ++bin) {  // heavy keys: equal magnitudes have one cutoff
      const uint32_t first = room.begin[bin], last = room.begin[bin + 1];
      if (last - first < kFew) continue;
      const auto [least, most] =
          std::minmax_element(room.by_bin.begin() + first, room.by_bin.begin() + last);
      if (*least == *most)
        room.least[bin] = room.most[bin] =
            cutoff_of(density, epsilon, place_of(first, last - first, length));
    }
    room.open.resize(length);
    uint64_t open = 0, look_ups = 0;
    for (uint64_t at = 0; at < length; ++at) {
      const uint32_t bin = (keys[at] - low) >> shift;
      const uint64_t its = room.words[at];
      const bool keeps = its < room.least[bin], undecided = !keeps & (its < room.most[bin]);
      room.kept[at] = keeps;
      room.open[open] = uint32_t(at);
      open += undecided;
      look_ups += undecided ? room.begin[bin + 1] - room.begin[bin] : 0;
    }
    if (look_ups > kLookUps * length) return false;
    for (uint64_t j = 0; j < open; ++j) {
      const uint32_t at = room.open[j], key = keys[at], bin = (key - low) >> shift;
      uint32_t smaller = 0, equal = 0;
      for (uint32_t i = room.begin[bin]; i < room.begin[bin + 1]; ++i) {
        smaller += room.by_bin[i] < key;
        equal += room.by_bin[i] == key;
      }
      const double place = place_of(room.begin[bin] + smaller, equal, length);
      room.kept[at] = room.words[at] < cutoff_of(density, epsilon, place);
    }
    return true;
  }

  // key(j), place(j): in ascending order of their keys, those of equal keys together. Most words
  // are below the cutoffs of all ranks, or above, so that the rank does not matter.
  template <class KeyAt, class Place>
  void groups(Room<Work>& room, double density, double epsilon, const KeyAt& key,
              const Place& place) const {
    const uint64_t least = cutoff_of(density, epsilon, 0), most = cutoff_of(density, epsilon, 1);
    for (uint64_t less = 0; less < rows_.length;) {
      uint64_t through = less + 1;
      while (through < rows_.length && key(through) == key(less)) ++through;
      const uint64_t equal = through - less, rank = less;
      for (; less < through; ++less) {
        const uint64_t at = place(less), its = room.words[at];
        room.kept[at] =
            its < least ||
            (its < most && its < cutoff_of(density, epsilon, place_of(rank, equal, rows_.length)));
      }
    }
  }

  void write(const std::vector<uint8_t>& kept, uint64_t first, uint64_t* bits) const {
    const uint64_t length = rows_.length;
    uint64_t from = 0, to = 0;  // in whole words of this row alone
    if (rows_.step == 1 && first >= begin_ && first + length <= end_) {
      from = std::min(length, (64 - (first - begin_) % 64) % 64);
      to = from + (length - from) / 64 * 64;
    }
    write_some(kept, 0, from, first, bits);
    for (uint64_t at = from; at < to; at += 64) {
      uint64_t word = 0;
      for (unsigned byte = 0; byte < 8; ++byte) {  // of 0 or 1 each
        uint64_t eight;
        std::memcpy(&eight, kept.data() + at + 8 * byte, 8);
        word |= (eight * 0x0102040810204080ull >> 56) << (8 * byte);
      }
      bits[(first + at - begin_) / 64] = word;
    }
    write_some(kept, to, length, first, bits);
  }

  // Elements from .. to - 1 of a row, whose words rows of other threads may share.
  void write_some(const std::vector<uint8_t>& kept, uint64_t from, uint64_t to, uint64_t first,
                  uint64_t* bits) const {
    uint64_t held = 0, word = UINT64_MAX;
    const auto flush = [&] {
      if (held != 0) __atomic_fetch_or(bits + word, held, __ATOMIC_RELAXED);
    };
    for (uint64_t at = from; at < to; ++at) {
      const uint64_t i = first + at * rows_.step;
      if (i < begin_ || i >= end_) continue;
      const uint64_t place = i - begin_;
      if (place / 64 != word) {
        flush();
        held = 0;
        word = place / 64;
      }
      held |= uint64_t(kept[at]) << place % 64;
    }
    flush();
  }

  const Context& ctx_;
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
  const Draw<Work> draw(ctx, plan, rows, begin, end);
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
