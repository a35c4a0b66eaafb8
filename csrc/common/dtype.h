// Element types and their conversions to and from the working precision, with IEEE-754 semantics
// everywhere: exact upwards, one rounding to nearest even downwards, subnormals kept, overflow to
// infinity, NaN to the canonical quiet NaN. In integers, so that host, device and every instruction
// set give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYMERGE_HD __host__ __device__
#else
#define PYMERGE_HD
#endif

namespace pymerge {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Storage of the two 16-bit types, so that templates can tell them apart.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline constexpr uint64_t size_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

template <class To, class From>
PYMERGE_HD inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PYMERGE_HD inline uint32_t float_bits(float x) { return bit_cast<uint32_t>(x); }
PYMERGE_HD inline float bits_float(uint32_t x) { return bit_cast<float>(x); }

PYMERGE_HD inline bool is_nan(float x) { return (float_bits(x) & 0x7fffffffu) > 0x7f800000u; }
PYMERGE_HD inline bool is_nan(double x) {
  return (bit_cast<uint64_t>(x) & 0x7fffffffffffffffull) > 0x7ff0000000000000ull;
}
PYMERGE_HD inline bool is_finite(float x) { return (float_bits(x) & 0x7f800000u) != 0x7f800000u; }
PYMERGE_HD inline bool is_finite(double x) {
  return (bit_cast<uint64_t>(x) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

PYMERGE_HD inline float to_float(float x) { return x; }
PYMERGE_HD inline float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
PYMERGE_HD inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude < 0x400u) {  // zero, subnormal: an exact multiple of 2^-24
    return bits_float(sign | float_bits(float(magnitude) * 5.9604644775390625e-8f));
  }
  return bits_float(sign | ((magnitude << 13) + 0x38000000u));
}

PYMERGE_HD inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (is_nan(x)) return {0x7fc0u};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

PYMERGE_HD inline Half to_half(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7e00u};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude >= 0x38800000u) {                                   // normal in fp16
    return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
  }
  if (magnitude < 0x33000000u)
    return {uint16_t(sign)};  // below 2^-25; 2^-25 itself ties to 0 below
  const uint32_t exponent = magnitude >> 23;
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126u - exponent;  // to units of 2^-24: 14 .. 24
  const uint32_t kept = significand >> shift;
  const uint32_t rest = significand & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  return {uint16_t(sign | (kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u)))};
}

// binary64 to binary32 rounded to odd: a further rounding to fewer bits is then as if done once.
PYMERGE_HD inline float round_to_odd(double x) {
  const float nearest = float(x);
  if (double(nearest) == x || is_nan(x)) return nearest;
  uint32_t bits = float_bits(nearest);
  const double size = x < 0 ? -x : x;
  const double nearest_size = bits_float(bits & 0x7fffffffu);
  if (nearest_size > size) bits -= 1u;  // truncate towards zero, also from infinity
  return bits_float(bits | 1u);
}

template <class Out>
struct Cast;
template <>
struct Cast<float> {
  PYMERGE_HD static float from(float x) { return is_nan(x) ? bits_float(0x7fc00000u) : x; }
  PYMERGE_HD static float from(double x) { return from(float(x)); }
};
template <>
struct Cast<double> {
  PYMERGE_HD static double from(double x) {
    return is_nan(x) ? bit_cast<double>(uint64_t(0x7ff8000000000000ull)) : x;
  }
};
template <>
struct Cast<BFloat16> {
  PYMERGE_HD static BFloat16 from(float x) { return to_bfloat16(x); }
  PYMERGE_HD static BFloat16 from(double x) { return to_bfloat16(round_to_odd(x)); }
};
template <>
struct Cast<Half> {
  PYMERGE_HD static Half from(float x) { return to_half(x); }
  PYMERGE_HD static Half from(double x) { return to_half(round_to_odd(x)); }
};

template <class Work, class T>
PYMERGE_HD inline Work widen(T x) {
  return Work(to_float(x));
}
template <>
PYMERGE_HD inline double widen<double, double>(double x) {
  return x;
}

// Element i of a buffer of unknown type and alignment.
template <class T>
inline T load_as(const void* data, uint64_t i) {
  T value;
  memcpy(&value, static_cast<const char*>(data) + i * sizeof(T), sizeof(T));
  return value;
}
template <class T>
inline void store_as(void* data, uint64_t i, T value) {
  memcpy(static_cast<char*>(data) + i * sizeof(T), &value, sizeof(T));
}

template <class Work>
inline Work load(DType type, const void* data, uint64_t i) {
  switch (type) {
    case DType::kFloat32:
      return Work(load_as<float>(data, i));
    case DType::kFloat16:
      return Work(to_float(load_as<Half>(data, i)));
    case DType::kBFloat16:
      return Work(to_float(load_as<BFloat16>(data, i)));
    default:
      return Work(load_as<double>(data, i));
  }
}

template <class Work>
inline void store(DType type, void* data, uint64_t i, Work value) {
  switch (type) {
    case DType::kFloat32:
      return store_as(data, i, Cast<float>::from(value));
    case DType::kFloat16:
      return store_as(data, i, Cast<Half>::from(value));
    case DType::kBFloat16:
      return store_as(data, i, Cast<BFloat16>::from(value));
    default:
      return store_as(data, i, Cast<double>::from(double(value)));
  }
}

}  // namespace pymerge
