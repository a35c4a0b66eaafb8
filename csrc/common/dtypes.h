// Element types and their exact conversions (T1, T6), in integers: the same bits on every host and device, whatever
// the floating-point mode says about subnormals.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYMERGE_HD __host__ __device__ __forceinline__
#else
#define PYMERGE_HD inline
#endif

namespace pymerge {

enum class Dtype : std::int32_t { None = -1, Float32 = 0, Float16 = 1, BFloat16 = 2, Float64 = 3 };

PYMERGE_HD int element_size(Dtype dtype) {
  return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2;
}

template <class To, class From>
PYMERGE_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PYMERGE_HD float bfloat16_to_float(std::uint16_t bits) {
  return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

PYMERGE_HD float float16_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  // Subnormal: rest * 2^-24, exact in binary32 and a normal number there.
  const float size = static_cast<float>(rest) * 5.9604644775390625e-8f;
  return bit_cast<float>(sign | bit_cast<std::uint32_t>(size));
}

// Round to nearest, ties to even; overflow gives infinity; NaN stays a (quiet) NaN.
PYMERGE_HD std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PYMERGE_HD std::uint16_t float_to_float16(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (rest >= 0x38800000u) {  // a normal half: drop 13 bits
    const std::uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  if (rest <= 0x33000000u) return static_cast<std::uint16_t>(sign);  // 2^-25 and below: nearest (even) is 0
  const std::uint32_t shift = 126u - (rest >> 23);                   // 14 to 24 bits dropped
  const std::uint32_t mantissa = (rest & 0x7fffffu) | 0x800000u;
  const std::uint32_t kept = mantissa >> shift;
  const std::uint32_t lost = mantissa & ((1u << shift) - 1u);
  const std::uint32_t half = 1u << (shift - 1u);
  return static_cast<std::uint16_t>(sign | (kept + (lost > half || (lost == half && (kept & 1u)) ? 1u : 0u)));
}

// A double as a float rounded to odd: rounding that once more to 16 bits is one rounding of the double.
PYMERGE_HD float double_to_float_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (!(value == value) || static_cast<double>(nearest) == value) return nearest;
  std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
  const double size = value < 0 ? -value : value;
  const double got = static_cast<double>(bit_cast<float>(bits & 0x7fffffffu));
  if (got > size) bits -= 1u;  // towards zero, also from infinity
  return bit_cast<float>(bits | 1u);
}

template <class F>
PYMERGE_HD std::uint16_t to_bfloat16(F value) {
  if constexpr (sizeof(F) == 8) return float_to_bfloat16(double_to_float_odd(value));
  else return float_to_bfloat16(value);
}

template <class F>
PYMERGE_HD std::uint16_t to_float16(F value) {
  if constexpr (sizeof(F) == 8) return float_to_float16(double_to_float_odd(value));
  else return float_to_float16(value);
}

// Element `index` in the working precision F. A double is never read into a float: fp64 makes F double.
template <class F>
PYMERGE_HD F load_element(const void* data, Dtype dtype, std::int64_t index) {
  switch (dtype) {
    case Dtype::Float32: return static_cast<F>(static_cast<const float*>(data)[index]);
    case Dtype::Float16: return static_cast<F>(float16_to_float(static_cast<const std::uint16_t*>(data)[index]));
    case Dtype::BFloat16: return static_cast<F>(bfloat16_to_float(static_cast<const std::uint16_t*>(data)[index]));
    default: return static_cast<F>(static_cast<const double*>(data)[index]);
  }
}

// The one cast of T6.
template <class F>
PYMERGE_HD void store_element(void* data, Dtype dtype, std::int64_t index, F value) {
  switch (dtype) {
    case Dtype::Float32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case Dtype::Float16: static_cast<std::uint16_t*>(data)[index] = to_float16(value); break;
    case Dtype::BFloat16: static_cast<std::uint16_t*>(data)[index] = to_bfloat16(value); break;
    default: static_cast<double*>(data)[index] = static_cast<double>(value); break;
  }
}

}  // namespace pymerge
