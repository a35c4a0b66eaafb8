// What every kernel needs: launches, vector loads and stores, sums over a warp.
#pragma once

#if defined(PYMERGE_EMULATE)
#include "emulate.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define PYMERGE_LAUNCH(kernel, grid, stream, ...)                              \
  do {                                                                         \
    (kernel)<<<(grid), ::pymerge::cuda::kThreads, 0, (stream)>>>(__VA_ARGS__); \
    ::pymerge::cuda::check(cudaGetLastError(), #kernel);                       \
  } while (0)

namespace pymerge::cuda {
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}
}  // namespace pymerge::cuda
#endif

#include <type_traits>

#include "common/dtype.h"
#include "cuda/core/tuning.h"

namespace pymerge::cuda {

using Count = unsigned long long;  // the type that 64-bit atomics take

__device__ __forceinline__ void add(std::uint64_t* where, std::uint64_t count) {
  atomicAdd(reinterpret_cast<Count*>(where), static_cast<Count>(count));
}
__device__ __forceinline__ void add(std::int64_t* where, std::uint64_t count) {
  atomicAdd(reinterpret_cast<Count*>(where), static_cast<Count>(count));
}

// Exact conversions upwards by the hardware, which keeps subnormals.
__device__ __forceinline__ float half_to_float(std::uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return to_float(Half{bits});
#endif
}

__device__ __forceinline__ float short_to_float(DType dtype, std::uint16_t bits) {
  return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : half_to_float(bits);
}

__device__ __forceinline__ std::uint16_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return value != value ? std::uint16_t{0x7e00u} : bits;  // N2: the hardware's NaN is 0x7fff
#else
  return to_half(value).bits;
#endif
}

// The one cast of T6, to a 16-bit type.
__device__ __forceinline__ std::uint16_t to_short(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? to_bfloat16(value).bits : float_to_half(value);
}
__device__ __forceinline__ std::uint16_t to_short(DType dtype, double value) {
  return to_short(dtype, round_to_odd(value));
}

// Vectors of an input, which nothing writes while a kernel runs, and of the output. By these
// intrinsics an access is one instruction on global memory; of an assignment through a cast pointer
// nvcc 13.0 makes a generic one for a load, and four of 4 bytes for a store. The output is not read
// again: it is first to leave the caches.
template <class V>
__device__ __forceinline__ V read_input(const void* data) {
  return __ldg(static_cast<const V*>(data));
}
template <class V>
__device__ __forceinline__ void write_output(void* data, V value) {
  __stcs(static_cast<V*>(data), value);
}

// Vectors that a kernel reads and writes, each by one thread, and that the next kernel reads: they
// stay in the L2 cache.
template <class V>
__device__ __forceinline__ V read_again(const void* data) {
  return __ldcg(static_cast<const V*>(data));
}
template <class V>
__device__ __forceinline__ void write_again(void* data, V value) {
  __stcg(static_cast<V*>(data), value);
}

// Whether a dtype is fp64, where that can be: an input or output of fp64 makes the working
// precision F double.
template <class F>
__device__ __forceinline__ bool is_double(DType dtype) {
  return std::is_same_v<F, double> && dtype == DType::kFloat64;
}

// Element i in the working precision F.
template <class F>
__device__ __forceinline__ F load_element(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<F>(static_cast<const float*>(data)[i]);
  if (is_double<F>(dtype)) return static_cast<F>(static_cast<const double*>(data)[i]);
  return static_cast<F>(short_to_float(dtype, static_cast<const std::uint16_t*>(data)[i]));
}

template <class F>
__device__ __forceinline__ void store_element(void* data, DType dtype, std::int64_t i, F value) {
  if (dtype == DType::kFloat32)
    static_cast<float*>(data)[i] = Cast<float>::from(value);
  else if (is_double<F>(dtype))
    static_cast<double*>(data)[i] = Cast<double>::from(value);
  else
    static_cast<std::uint16_t*>(data)[i] = to_short(dtype, value);
}

// Elements i to i + count - 1 in the working precision, i a multiple of kWidth; the rest of x
// becomes 0.
template <class F>
__device__ __forceinline__ void load(const void* data, DType dtype, bool aligned, std::int64_t i,
                                     int count, F (&x)[kWidth]) {
  if (aligned && count == kWidth) {
    if (dtype == DType::kFloat32) {
      const float* at = static_cast<const float*>(data) + i;
      float4 four[kWidth / 4];  // all of them before the first is used
#pragma unroll
      for (int v = 0; v < kWidth / 4; ++v) four[v] = read_input<float4>(at + 4 * v);
#pragma unroll
      for (int v = 0; v < kWidth / 4; ++v) {
        x[4 * v] = four[v].x, x[4 * v + 1] = four[v].y;
        x[4 * v + 2] = four[v].z, x[4 * v + 3] = four[v].w;
      }
    } else if (is_double<F>(dtype)) {
      const double* at = static_cast<const double*>(data) + i;
#pragma unroll
      for (int v = 0; v < kWidth; v += 2) {
        const double2 two = read_input<double2>(at + v);
        x[v] = static_cast<F>(two.x), x[v + 1] = static_cast<F>(two.y);
      }
    } else {
      const uint4 eight = read_input<uint4>(static_cast<const std::uint16_t*>(data) + i);
      const std::uint32_t word[kWidth / 2] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const std::uint16_t bits = static_cast<std::uint16_t>(word[j / 2] >> (16 * (j % 2)));
        x[j] = static_cast<F>(short_to_float(dtype, bits));
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) x[j] = j < count ? load_element<F>(data, dtype, i + j) : F(0);
}

template <class F>
__device__ __forceinline__ void store(void* data, DType dtype, bool aligned, std::int64_t i,
                                      int count, const F (&x)[kWidth]) {
  if (aligned && count == kWidth) {
    if (dtype == DType::kFloat32) {
      float* at = static_cast<float*>(data) + i;
#pragma unroll
      for (int v = 0; v < kWidth; v += 4) {
        write_output(at + v, make_float4(Cast<float>::from(x[v]), Cast<float>::from(x[v + 1]),
                                         Cast<float>::from(x[v + 2]), Cast<float>::from(x[v + 3])));
      }
    } else if (is_double<F>(dtype)) {
      double* at = static_cast<double*>(data) + i;
#pragma unroll
      for (int v = 0; v < kWidth; v += 2) {
        write_output(at + v, make_double2(Cast<double>::from(x[v]), Cast<double>::from(x[v + 1])));
      }
    } else {
      std::uint32_t word[kWidth / 2];
#pragma unroll
      for (int v = 0; v < kWidth / 2; ++v) {
        word[v] = to_short(dtype, x[2 * v]) |
                  static_cast<std::uint32_t>(to_short(dtype, x[2 * v + 1])) << 16;
      }
      write_output(static_cast<std::uint16_t*>(data) + i,
                   make_uint4(word[0], word[1], word[2], word[3]));
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if (j < count) store_element<F>(data, dtype, i + j, x[j]);
  }
}

// Sum over the warp, in every lane. All 32 lanes take part.
__device__ __forceinline__ unsigned warp_sum(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, value);
#else
  for (int width = 16; width > 0; width /= 2) value += __shfl_xor_sync(0xffffffffu, value, width);
  return value;
#endif
}

// How many of kWidth elements starting at i lie below `end`.
__device__ __forceinline__ int available(std::int64_t i, std::int64_t end) {
  return i >= end ? 0 : end - i >= kWidth ? kWidth : static_cast<int>(end - i);
}

}  // namespace pymerge::cuda
