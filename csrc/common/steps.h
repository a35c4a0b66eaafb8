// The rule of docs/spec/ties.md in steps (T3, T4, T5, N1, N2), for loops that take the models one
// after the other and hold nothing per model:
//
//   Election<Work> election;                              Disjoint<Work> merge;
//   for each k: election.see(delta)                       for each k that is kept and agrees(...):
//               if kept: election.vote(trimmed, e_k)          merge.add(how, trimmed, w_k)
//   sign = election.outcome(how)                          merged = merge.merged(...)
//
// Compile with contraction off: every product and sum is its own rounding.
#pragma once

#include <cstdint>

#include "common/rule.h"

namespace pymerge {

// The bits of a magnitude: they order as the magnitudes do.
template <class Work>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr type infinity = 0x7f800000u;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr type infinity = 0x7ff0000000000000ull;
};
template <class Work>
using Key = typename KeyOf<Work>::type;

template <class Work>
PYMERGE_HD inline Key<Work> absolute_bits(Work x) {
  return bit_cast<Key<Work>>(x) & static_cast<Key<Work>>(~Key<Work>(0) >> 1);
}

// N1: a NaN has magnitude 0.
template <class Work>
PYMERGE_HD inline Key<Work> magnitude_key(Work delta) {
  const Key<Work> bits = absolute_bits(delta);
  return bits > KeyOf<Work>::infinity ? Key<Work>(0) : bits;
}

// T3: the magnitudes kept, as keys. A lower end above every key keeps none.
template <class Work>
struct Band {
  Key<Work> lower, upper;
  PYMERGE_HD bool keeps(Work delta) const {
    const Key<Work> key = magnitude_key(delta);
    return key >= lower && key <= upper;
  }
};

// T4 and N2.
template <class Work>
struct Election {
  enum : uint32_t { kAbove = 1, kBelow = 2, kInfiniteUp = 4, kInfiniteDown = 8, kNaN = 16 };
  Work sum = 0;
  int32_t balance = 0;
  uint32_t seen = 0;

  PYMERGE_HD void see(Work delta) {
    if (delta != delta) seen |= kNaN;
  }

  // For a kept element. trimmed: delta' of T3r; weight: e_k.
  PYMERGE_HD void vote(Work trimmed, Work weight) {
    const Work value = trimmed * weight;
    sum = sum + value;
    if (value > 0) {
      ++balance;
      seen |= kAbove;
    } else if (value < 0) {
      --balance;
      seen |= kBelow;
    }
    if (absolute_bits(trimmed) == KeyOf<Work>::infinity)
      seen |= trimmed > 0 ? kInfiniteUp : kInfiniteDown;
  }

  // +1 where S > 0, -1 where S < 0, else 0 (S is zero, or NaN).
  PYMERGE_HD int outcome(Elect elect) const {
    if (elect == Elect::kCount) return balance > 0 ? 1 : balance < 0 ? -1 : 0;
    return sum > 0 ? 1 : sum < 0 ? -1 : 0;
  }

  // The zero sign can show in the output only where somebody voted.
  PYMERGE_HD bool anyone() const { return (seen & (kAbove | kBelow)) != 0; }
  PYMERGE_HD bool conflict() const {
    return (seen & (kAbove | kBelow)) == uint32_t(kAbove | kBelow);
  }
  PYMERGE_HD bool poisoned() const {
    const uint32_t both = kInfiniteUp | kInfiniteDown;
    return (seen & kNaN) != 0 || (seen & both) == both;
  }
};

// T4, last lines, for a kept element: value is e_k * delta'.
template <class Work>
PYMERGE_HD inline bool agrees(Elect elect, int sign, Work value) {
  return elect == Elect::kNone || (sign > 0 ? value > 0 : value < 0);
}

// T5.
template <class Work>
struct Disjoint {
  Work total = 0;    // for kMax the best product so far
  Work divisor = 0;  // sum of weights, or the count

  // For an agreeing element.
  PYMERGE_HD void add(Merge merge, Work trimmed, Work weight) {
    const Work product = trimmed * weight;
    if (merge == Merge::kMax) {
      if (magnitude_of(product) > magnitude_of(total)) total = product;
      return;
    }
    total = total + product;
    if (merge == Merge::kWeightedMean) divisor = divisor + weight;
    if (merge == Merge::kMean && trimmed != 0) divisor = divisor + Work(1);
  }

  // total_weight: the sum of all w_k in model order, for weighted_mean without an election.
  PYMERGE_HD Work merged(Merge merge, Elect elect, Work total_weight) const {
    if (merge == Merge::kSum || merge == Merge::kMax) return total;
    Work by = divisor;
    if (merge == Merge::kWeightedMean && elect == Elect::kNone) {
      by = magnitude_of(total_weight) < Work(1e-8) ? Work(1) : total_weight;
    }
    return total / (by == 0 ? Work(1) : by);
  }
};

// T6 and N2, before the cast.
template <class Work>
PYMERGE_HD inline Work output(bool has_base, Work base, Work scaling, Work merged, bool poisoned) {
  const Work scaled = merged * scaling;
  const Work value = has_base ? base + scaled : scaled;
  return poisoned ? quiet_nan<Work>() : value;
}

}  // namespace pymerge
