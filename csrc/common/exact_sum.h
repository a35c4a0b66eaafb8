// Exact sums of magnitudes and of their squares, and their quotient rounded once (T9), for host and
// device. A sum is an integer in units of 2^kLowest, in limbs of 24 bits that are carried now and
// then; every sum of binary64 numbers and of their squares fits.
#pragma once

#include <math.h>

#include <cstdint>

#include "common/key.h"
#include "common/ties.h"

namespace pymerge::exact {

constexpr int kLimbBits = 24;
constexpr uint64_t kLimbMask = (uint64_t(1) << kLimbBits) - 1;
constexpr int kLowest = -90 * kLimbBits;  // below 2^-2148, the least square of binary64
constexpr int kLimbs = 180;  // up to 2^2160: the largest square of binary64 2^112 times

// T3r: with a norm below it, before or after, a model is not rescaled.
constexpr double kLeastNorm = 1e-7;

// x = significand * 2^exponent, for a finite x >= 0.
struct Parts {
  uint64_t significand;
  int exponent;
};

PYMERGE_HD inline Parts parts_of(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x), fraction = bits & ((uint64_t(1) << 52) - 1);
  const int field = int(bits >> 52 & 0x7ff);
  if (field == 0) return {fraction, -1074};
  return {fraction | uint64_t(1) << 52, field - 1075};
}

// put(limb, term) adds term < 2^25 to a limb: bits * 2^(kLowest + place), for bits < 2^48.
template <class Put>
PYMERGE_HD inline void put_bits(uint64_t bits, int place, const Put& put) {
  const int limb = place / kLimbBits, shift = place % kLimbBits;
  const uint64_t low = (bits & kLimbMask) << shift, high = (bits >> kLimbBits) << shift;
  put(limb, low & kLimbMask);
  put(limb + 1, (low >> kLimbBits) + (high & kLimbMask));
  put(limb + 2, high >> kLimbBits);
}

// Adds a finite x >= 0, or its square.
template <class Put>
PYMERGE_HD inline void put_term(double x, bool square, const Put& put) {
  const Parts parts = parts_of(x);
  if (parts.significand == 0) return;
  uint64_t piece[3];
  for (int i = 0; i < 3; ++i) piece[i] = parts.significand >> (kLimbBits * i) & kLimbMask;
  if (!square) {
    const int place = parts.exponent - kLowest;
    put_bits(piece[0] | piece[1] << kLimbBits, place, put);
    if (piece[2] != 0) put_bits(piece[2], place + 2 * kLimbBits, put);
    return;
  }
  const int place = 2 * parts.exponent - kLowest;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      const uint64_t product = piece[i] * piece[j];
      if (product != 0) put_bits(product, place + (i + j) * kLimbBits, put);
    }
  }
}

PYMERGE_HD inline void carry(uint64_t* limbs) {
  uint64_t over = 0;
  for (int i = 0; i < kLimbs; ++i) {
    limbs[i] += over;
    over = limbs[i] >> kLimbBits;
    limbs[i] &= kLimbMask;
  }
}

// A carried sum above 0 to the precision of binary64, as value * 2^exponent.
struct Leading {
  double value;
  int exponent;
};

PYMERGE_HD inline Leading leading(const uint64_t* limbs) {
  int top = kLimbs - 1;
  while (top > 3 && limbs[top] == 0) --top;
  const double high = double(limbs[top] << kLimbBits | limbs[top - 1]);
  const double low = double(limbs[top - 2] << kLimbBits | limbs[top - 3]);
  return {high * double(uint64_t(1) << 2 * kLimbBits) + low, kLowest + kLimbBits * (top - 3)};
}

// The sign of a - y b, or of a - y^2 b, for y = m * 2^e with m < 2^55; a and b are carried. A null
// b is 1.
PYMERGE_HD inline int compare(const uint64_t* a, const uint64_t* b, uint64_t m, int e,
                              bool square) {
  constexpr int kPieces = 6;
  uint64_t piece[kPieces] = {};
  for (int i = 0; i < 3; ++i) piece[i] = m >> (kLimbBits * i) & kLimbMask;
  if (square) {
    uint64_t product[kPieces] = {};
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) product[i + j] += piece[i] * piece[j];
    }
    for (int i = 0; i < kPieces; ++i) piece[i] = product[i];
    e *= 2;
  }
  // y's factor is then the pieces in units of 2^(24 place), in which b's limbs are whole.
  int place = e / kLimbBits - (e % kLimbBits < 0 ? 1 : 0);
  const int shift = e - place * kLimbBits;
  uint64_t over = 0;
  for (int i = 0; i < kPieces; ++i) {
    // The products of before are below 2^50, which leaves no room for the shift.
    const uint64_t low = (piece[i] & kLimbMask) << shift, high = piece[i] >> kLimbBits << shift;
    const uint64_t sum = low + over;
    piece[i] = sum & kLimbMask;
    over = (sum >> kLimbBits) + high;
  }
  constexpr int kOne = -kLowest / kLimbBits;
  const auto limb_of_b = [&](int i) {
    if (b == nullptr) return i == kOne ? uint64_t(1) : uint64_t(0);
    return i < 0 || i >= kLimbs ? uint64_t(0) : b[i];
  };
  const int from = place < 0 ? place : 0;
  const int to = kLimbs + kPieces + (place > 0 ? place : 0);
  int64_t carried = 0;
  bool rest = false;
  for (int i = from; i < to; ++i) {
    int64_t d = carried + (i >= 0 && i < kLimbs ? int64_t(a[i]) : 0);
    for (int j = 0; j < kPieces; ++j) d -= int64_t(piece[j] * limb_of_b(i - place - j));
    rest |= (d & int64_t(kLimbMask)) != 0;
    carried = d >> kLimbBits;
  }
  return carried < 0 ? -1 : carried > 0 || rest ? 1 : 0;
}

// What rounding to a working precision needs to know of it.
template <class Work>
struct Precision;
template <>
struct Precision<float> {
  static constexpr int kBits = 24, kLeast = -149;
};
template <>
struct Precision<double> {
  static constexpr int kBits = 53, kLeast = -1074;
};

// m * 2^e for m <= 2^kBits, and 2^(kBits - 1) <= m where e > kLeast; infinity where it is larger
// than all numbers of Work.
template <class Work>
PYMERGE_HD inline Work number_of(uint64_t m, int e) {
  constexpr int kBits = Precision<Work>::kBits, kLeast = Precision<Work>::kLeast;
  if (m >> kBits != 0) m /= 2, ++e;
  if (m >> (kBits - 1) == 0) return bit_cast<Work>(Key<Work>(m));
  constexpr uint64_t kInfinite = KeyOf<Work>::infinity >> (kBits - 1);
  const uint64_t field = uint64_t(e - kLeast + 1);
  if (field >= kInfinite) return infinity<Work>();
  const uint64_t fraction = m & ((uint64_t(1) << (kBits - 1)) - 1);
  return bit_cast<Work>(Key<Work>(field << (kBits - 1) | fraction));
}

// a / b, or its root, rounded once to Work, to nearest, ties to even, for carried a, b > 0.
template <class Work>
PYMERGE_HD inline Work rounded_quotient(const uint64_t* a, const uint64_t* b, bool root) {
  constexpr int kBits = Precision<Work>::kBits, kLeast = Precision<Work>::kLeast;
  constexpr double kTop = double(uint64_t(1) << kBits);
  // An estimate y * 2^e, right to some units in the last place of binary64.
  const Leading over = leading(a), under = leading(b);
  double y = over.value / under.value;
  int e = over.exponent - under.exponent;
  if (root) {
    if (e % 2 != 0) y *= 2, --e;
    y = sqrt(y), e /= 2;
  }
  for (; y >= kTop || e < kLeast; y /= 2) ++e;
  for (; y < kTop / 2 && e > kLeast; y *= 2) --e;
  // Its floor m in units of 2^e, made exact.
  uint64_t m = uint64_t(y);
  const auto reaches = [&](uint64_t its) { return compare(a, b, its, e, root) >= 0; };
  while (m > 0 && !reaches(m)) --m;
  while (reaches(m + 1)) ++m;
  if (m >> kBits != 0) m /= 2, ++e;  // 2^kBits: the estimate was under a power of two
  if (m >> (kBits - 1) == 0 && e > kLeast) {
    --e, m *= 2;  // or over it
    if (reaches(m + 1)) ++m;
  }
  const int half = compare(a, b, 2 * m + 1, e - 1, root);
  if (half > 0 || (half == 0 && m % 2 == 1)) ++m;
  return number_of<Work>(m, e);
}

// Whether the sum, or its root, is at least y.
PYMERGE_HD inline bool is_at_least(const uint64_t* sum, double y, bool root) {
  const Parts parts = parts_of(y);
  return compare(sum, nullptr, parts.significand, parts.exponent, root) >= 0;
}

// A sum of magnitudes or of squares, {} for 0. At most 2^33 terms are added before it is carried.
struct Sum {
  uint64_t limbs[kLimbs];
  bool infinite, nan;  // a term is

  // put(limb, term) adds to a limb: of this sum, by whatever way threads share it.
  template <class Put>
  PYMERGE_HD void add(double x, bool square, const Put& put) {
    if (is_nan(x)) {
      nan = true;
    } else if (!is_finite(x)) {
      infinite = true;
    } else {
      put_term(x < 0 ? -x : x, square, put);
    }
  }
  PYMERGE_HD void add(double x, bool square) {
    add(x, square, [this](int limb, uint64_t term) { limbs[limb] += term; });
  }
  PYMERGE_HD void add(const Sum& other) {  // both carried, as is the result
    infinite |= other.infinite;
    nan |= other.nan;
    for (int i = 0; i < kLimbs; ++i) limbs[i] += other.limbs[i];
    carry();
  }
  PYMERGE_HD void carry() { exact::carry(limbs); }
};

// f_k of T9 from carried sums.
template <class Work>
PYMERGE_HD inline Work factor(const Sum& before, const Sum& after, bool root) {
  if (before.nan) return Work(1);
  if (!before.infinite && !is_at_least(before.limbs, kLeastNorm, root)) return Work(1);
  if (!after.infinite && !is_at_least(after.limbs, kLeastNorm, root)) return Work(1);
  if (after.infinite) return quiet_nan<Work>();
  if (before.infinite) return infinity<Work>();
  return rounded_quotient<Work>(before.limbs, after.limbs, root);
}

// f_k of T9 from sums that are right to `error`, relative; false where they do not settle it.
template <class Work>
PYMERGE_HD inline bool settles(double before, double after, double error, bool root, Work* factor) {
  *factor = Work(1);
  if (is_nan(before) || is_nan(after)) return true;
  if (root) before = sqrt(before), after = sqrt(after);
  const double low = kLeastNorm * (1 - error), high = kLeastNorm * (1 + error);
  if (before < low || after < low) return true;
  if (before < high || after < high) return false;
  const double quotient = before / after;
  const Work under = Work(quotient * (1 - 4 * error));
  *factor = Work(quotient * (1 + 4 * error));
  return *factor == under || !is_finite(before);
}

}  // namespace pymerge::exact
