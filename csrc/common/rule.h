// What `ties` does to one element (docs/spec/ties.md, T3r to T6 and N2), for host and device: the scalar truth that
// the vector loops follow. Compile with contraction off.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

enum class Trim : int { kMagnitude = 0, kNone = 1, kOutliers = 2, kRandom = 3 };
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

// delta(k) -> Work: the task vector of model k (T1). keep(k) -> bool: kept by T3. base: ignored without has_base.
// With a compile-time `count` the loops unroll.
template <class Work, class Delta, class Keep>
PYMERGE_HD inline Element<Work> evaluate(const ElementRule<Work>& rule, int count, Work base,
                                         const Delta& delta, const Keep& keep) {
  bool poison = false, infinite_up = false, infinite_down = false;
  int above = 0, below = 0;
  Work sum = 0;
  for (int k = 0; k < count; ++k) {
    const Work d = delta(k);
    poison |= is_nan(d);
    if (!keep(k)) continue;
    const Work t = rescaled(d, rule.rescale[k], rule.rescale_by[k]);
    if (!is_finite(t) && !is_nan(t)) {
      infinite_up |= t > 0;
      infinite_down |= t < 0;
    }
    const Work v = t * rule.elect_weights[k];
    above += v > 0;
    below += v < 0;
    if (rule.elect == Elect::kSum) sum = sum + v;  // T4, in model order
  }
  poison |= infinite_up && infinite_down;

  Element<Work> result;
  result.conflict = above > 0 && below > 0;
  const bool elects = rule.elect != Elect::kNone;
  const bool up = elects && (rule.elect == Elect::kSum ? sum > 0 : above > below);
  const bool down = elects && (rule.elect == Elect::kSum ? sum < 0 : above < below);
  result.balance = up ? 1 : down ? -1 : 0;
  result.undecided = elects && (above > 0 || below > 0) && !up && !down;
  const bool negative = down || (!up && rule.zero_negative);

  Work total = 0, divisor = 0, count_of = 0;
  for (int k = 0; k < count; ++k) {  // T5
    if (!keep(k)) continue;
    const Work t = rescaled(delta(k), rule.rescale[k], rule.rescale_by[k]);
    if (elects) {
      const Work v = t * rule.elect_weights[k];
      if (!(negative ? v < 0 : v > 0)) continue;
    }
    const Work p = t * rule.weights[k];
    if (rule.merge == Merge::kMax) {
      if (magnitude_of(p) > magnitude_of(total)) total = p;
      continue;
    }
    total = total + p;
    divisor = divisor + rule.weights[k];
    count_of = count_of + Work(t != 0 ? 1 : 0);
  }
  if (rule.merge == Merge::kWeightedMean) {
    if (!elects) {
      divisor = magnitude_of(rule.total_weight) < Work(1e-8) ? Work(1) : rule.total_weight;
    } else if (divisor == 0) {
      divisor = 1;
    }
    total = total / divisor;
  } else if (rule.merge == Merge::kMean) {
    total = total / (count_of < 1 ? Work(1) : count_of);
  }
  Work value = total * rule.scaling;  // T6
  if (rule.has_base) value = base + value;
  result.value = poison ? quiet_nan<Work>() : value;
  return result;
}

}  // namespace pymerge
