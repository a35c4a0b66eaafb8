// Magnitudes as integers (T3): selection by radix and comparison with a threshold, N1 included.
#pragma once

#include "common/dtype.h"

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

// T3: the magnitudes kept, as keys. A lower end above every key keeps none. Used by the CUDA
// kernels; the CPU kernels compare floats (cpu/ties/kernels_body.h, and `keeps` in cpu/ties/plan.h
// for what is beside whole vectors).
template <class Work>
struct Band {
  Key<Work> lower, upper;
  PYMERGE_HD bool keeps(Work delta) const {
    const Key<Work> key = magnitude_key(delta);
    return key >= lower && key <= upper;
  }
};

}  // namespace pymerge
