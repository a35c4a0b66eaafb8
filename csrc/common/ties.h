// What `ties` does to one element (docs/spec/ties.md, T3r to T6 and N2), for host and device: the
// scalar truth that the vector loops follow. Compile with contraction off.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

enum class Trim : int { kMagnitude = 0, kNone = 1, kOutliers = 2, kRandom = 3, kMagprune = 4 };
enum class Elect : int { kSum = 0, kCount = 1, kNone = 2 };
enum class Merge : int { kWeightedMean = 0, kMean = 1, kSum = 2, kMax = 3 };
enum class Rescale : int { kNone = 0, kDivide = 1, kMultiply = 2 };  // one model's T3r, resolved

// T4 to T6 in the working precision Work. Arrays have one entry a model.
template <class Work>
struct ElementRule {
  Elect elect;
  Merge merge;
  bool zero_negative;  // T4: S = 0 elects -
  bool has_base;
  Work scaling;
  Work total_weight;          // T5, elect none: the sum of all weights, in model order
  const Work* weights;        // w_k
  const Work* elect_weights;  // e_k
  const Rescale* rescale;     // T3r
  const Work* rescale_by;     // d_k or f_k
};

template <class Work>
struct Element {
  Work value;      // before the cast of T6; NaN where N2 says so
  int balance;     // sign of S: +1, -1, 0; 0 with elect none
  bool conflict;   // kept election values of both signs
  bool undecided;  // kept election values, but no sign: the zero sign says which of them take part
};

template <class Work>
PYMERGE_HD inline Work rescaled(Work delta, Rescale rescale, Work by) {
  if (rescale == Rescale::kDivide) return delta / by;
  if (rescale == Rescale::kMultiply) return delta * by;
  return delta;
}

template <class Work>
PYMERGE_HD inline Work magnitude_of(Work x) {
  return x < 0 ? -x : x;
}

template <class Work>
PYMERGE_HD inline Work quiet_nan();
template <>
PYMERGE_HD inline float quiet_nan<float>() {
  return bits_float(0x7fc00000u);
}
template <>
PYMERGE_HD inline double quiet_nan<double>() {
  return bit_cast<double>(uint64_t(0x7ff8000000000000ull));
}

template <class Work>
PYMERGE_HD inline Work infinity();
template <>
PYMERGE_HD inline float infinity<float>() {
  return bits_float(0x7f800000u);
}
template <>
PYMERGE_HD inline double infinity<double>() {
  return bit_cast<double>(uint64_t(0x7ff0000000000000ull));
}

// T4 and N2 in steps, for loops that take the models one after the other and hold nothing per
// model: see() each, vote() the kept; then Disjoint takes those that agree.
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
    if (magnitude_of(trimmed) == infinity<Work>())
      seen |= trimmed > 0 ? kInfiniteUp : kInfiniteDown;
  }

  // +1 where S > 0, -1 where S < 0, else 0 (S is zero, or NaN; or there is no election).
  PYMERGE_HD int outcome(Elect elect) const {
    if (elect == Elect::kNone) return 0;
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

// delta(k) -> Work: the task vector of model k (T1). keep(k) -> bool: kept by T3. base: ignored
// without has_base. With a compile-time `count` the loops unroll.
template <class Work, class Delta, class Keep>
PYMERGE_HD inline Element<Work> evaluate(const ElementRule<Work>& rule, int count, Work base,
                                         const Delta& delta, const Keep& keep) {
  Election<Work> election;
  for (int k = 0; k < count; ++k) {
    const Work d = delta(k);
    election.see(d);
    if (keep(k))
      election.vote(rescaled(d, rule.rescale[k], rule.rescale_by[k]), rule.elect_weights[k]);
  }
  Element<Work> result;
  result.conflict = election.conflict();
  result.balance = election.outcome(rule.elect);
  result.undecided = rule.elect != Elect::kNone && election.anyone() && result.balance == 0;
  const int sign = result.balance != 0 ? result.balance : rule.zero_negative ? -1 : 1;  // T4
  Disjoint<Work> merge;
  for (int k = 0; k < count; ++k) {
    if (!keep(k)) continue;
    const Work t = rescaled(delta(k), rule.rescale[k], rule.rescale_by[k]);
    if (agrees(rule.elect, sign, t * rule.elect_weights[k]))
      merge.add(rule.merge, t, rule.weights[k]);
  }
  const Work merged = merge.merged(rule.merge, rule.elect, rule.total_weight);
  result.value = output(rule.has_base, base, rule.scaling, merged, election.poisoned());
  return result;
}

}  // namespace pymerge
