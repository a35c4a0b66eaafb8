// The rule of docs/spec/ties.md for one element, in the working precision F (float or double). One text for host and
// device. Compile without contraction (-ffp-contract=off, --fmad=false): every product and sum is its own rounding.
//
// An element goes through two loops over the models, in model order:
//
//   Election<F> election;                         Disjoint<F> merge;
//   for each k: election.see(delta)               for each k: if kept and agrees(elect, sign, e_k * trimmed)
//               if kept: election.vote(...)                     merge.add(...)
//   sign = election.sign(...)                     out = output(...)
#pragma once

#include "dtypes.h"
#include "philox.h"

namespace pymerge {

enum class Trim : std::int32_t { None, Magnitude, Outliers, Random };
enum class Elect : std::int32_t { None, Sum, Count };
enum class Merge : std::int32_t { Sum, WeightedMean, Mean, Max };
enum class Rescale : std::int32_t { None, Density, L1, L2, Linf };

// The bits of a magnitude: they order as the magnitudes do.
template <class F>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = std::uint32_t;
  static constexpr type infinity = 0x7f800000u;
};
template <>
struct KeyOf<double> {
  using type = std::uint64_t;
  static constexpr type infinity = 0x7ff0000000000000ull;
};
template <class F>
using Key = typename KeyOf<F>::type;

template <class F>
PYMERGE_HD Key<F> absolute_bits(F delta) {
  return bit_cast<Key<F>>(delta) & static_cast<Key<F>>(~Key<F>(0) >> 1);
}

// N1: a NaN has magnitude 0.
template <class F>
PYMERGE_HD Key<F> magnitude_key(F delta) {
  const Key<F> bits = absolute_bits(delta);
  return bits > KeyOf<F>::infinity ? Key<F>(0) : bits;
}

template <class F>
PYMERGE_HD bool is_finite(F delta) {
  return absolute_bits(delta) < KeyOf<F>::infinity;
}

// T3: the magnitudes kept, as keys. A lower end above every key keeps none.
template <class F>
struct Band {
  Key<F> lower, upper;
  PYMERGE_HD bool keeps(F delta) const {
    const Key<F> key = magnitude_key(delta);
    return key >= lower && key <= upper;
  }
};

// T3r on a kept element. `divisor` is the density, `factor` the ratio of norms; unused ones are not looked at.
template <class F>
PYMERGE_HD F rescaled(Rescale rescale, F delta, F divisor, F factor) {
  if (rescale == Rescale::None) return delta;
  return rescale == Rescale::Density ? delta / divisor : delta * factor;
}

// T4 and N2.
template <class F>
struct Election {
  enum : std::uint32_t { Above = 1, Below = 2, PlusInfinity = 4, MinusInfinity = 8, NotANumber = 16 };
  F sum = 0;
  std::int32_t balance = 0;
  std::uint32_t seen = 0;

  PYMERGE_HD void see(F delta) {
    if (delta != delta) seen |= NotANumber;
  }

  // For a kept element. trimmed: delta' of T3r; weight: e_k.
  PYMERGE_HD void vote(F trimmed, F weight) {
    const F value = weight * trimmed;
    sum = sum + value;
    if (value > 0) {
      ++balance;
      seen |= Above;
    } else if (value < 0) {
      --balance;
      seen |= Below;
    }
    if (absolute_bits(trimmed) == KeyOf<F>::infinity) seen |= trimmed > 0 ? PlusInfinity : MinusInfinity;
  }

  // +1 where S > 0, -1 where S < 0, else 0 (S is zero, or NaN).
  PYMERGE_HD int outcome(Elect elect) const {
    if (elect == Elect::Count) return balance > 0 ? 1 : balance < 0 ? -1 : 0;
    return sum > 0 ? 1 : sum < 0 ? -1 : 0;
  }

  // The zero sign can show in the output only where somebody voted.
  PYMERGE_HD bool anyone() const { return (seen & (Above | Below)) != 0; }
  PYMERGE_HD bool conflict() const { return (seen & (Above | Below)) == (Above | Below); }
  PYMERGE_HD bool poisoned() const {
    return (seen & NotANumber) != 0 ||
           (seen & (PlusInfinity | MinusInfinity)) == static_cast<std::uint32_t>(PlusInfinity | MinusInfinity);
  }
};

// T4, last lines, for a kept element: value is e_k * delta'.
template <class F>
PYMERGE_HD bool agrees(Elect elect, int sign, F value) {
  return elect == Elect::None || (sign > 0 ? value > 0 : value < 0);
}

// T5.
template <class F>
struct Disjoint {
  F total = 0;    // for Max the best product so far
  F divisor = 0;  // sum of weights, or the count

  // For an agreeing element.
  PYMERGE_HD void add(Merge merge, F trimmed, F weight) {
    const F product = weight * trimmed;
    if (merge == Merge::Max) {
      if (absolute_bits(product) > absolute_bits(total) && product == product) total = product;
      return;
    }
    total = total + product;
    if (merge == Merge::WeightedMean) divisor = divisor + weight;
    if (merge == Merge::Mean && trimmed != 0) divisor = divisor + F(1);
  }

  // every_weight: the sum of all w_k in model order, for weighted_mean without an election.
  PYMERGE_HD F merged(Merge merge, Elect elect, F every_weight) const {
    if (merge == Merge::Sum || merge == Merge::Max) return total;
    F by = divisor;
    if (merge == Merge::WeightedMean && elect == Elect::None) {
      by = every_weight;
      if ((by < 0 ? -by : by) < F(1e-8)) by = 1;
    }
    return total / (by == 0 ? F(1) : by);
  }
};

// T6 and N2, before the cast.
template <class F>
PYMERGE_HD F output(bool has_base, F base, F scaling, F merged, bool poisoned) {
  if (poisoned) return bit_cast<F>(static_cast<Key<F>>(KeyOf<F>::infinity | (KeyOf<F>::infinity >> 1)));
  const F scaled = scaling * merged;
  return has_base ? base + scaled : scaled;
}

}  // namespace pymerge
