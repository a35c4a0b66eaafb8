// The vector updates of conjugate gradient (M6 to M9): bytes moved of a layer of n elements of size
// e are 2ne, 6ne, 2ne and, where a step is limited, 4ne, else 3ne. Each block of an update adds up
// the partial sums before it by itself, so that nothing is launched in between; the layer's first
// block writes the state. 16 bytes a thread and access where every row is aligned to that, else the
// same elements one by one, in the same order of sums.

#include <limits>
#include <stdexcept>

#include "cuda/core/runtime.h"
#include "cuda/mats/cg.cuh"

namespace pymerge::cuda {
namespace {

constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

// 16 bytes of T.
template <class T>
struct Wide;
template <>
struct Wide<float> {
  static constexpr int kCount = 4;
  using Type = float4;
  static __device__ __forceinline__ void unpack(const float4& from, float (&x)[4]) {
    x[0] = from.x, x[1] = from.y, x[2] = from.z, x[3] = from.w;
  }
  static __device__ __forceinline__ float4 pack(const float (&x)[4]) {
    return make_float4(x[0], x[1], x[2], x[3]);
  }
};
template <>
struct Wide<double> {
  static constexpr int kCount = 2;
  using Type = double2;
  static __device__ __forceinline__ void unpack(const double2& from, double (&x)[2]) {
    x[0] = from.x, x[1] = from.y;
  }
  static __device__ __forceinline__ double2 pack(const double (&x)[2]) {
    return make_double2(x[0], x[1]);
  }
};

// A thread's next elements: where they are, and how many of them there are.
struct Span {
  std::int64_t at;
  int count;
  bool whole;  // all of them, aligned
};

// Elements of a vector that the kernel does not write, or, where it does, that no other thread
// writes; 0 past the end.
template <bool Written, class T, int V>
__device__ __forceinline__ void read(const T* from, const Span& span, T (&x)[V]) {
  if (span.whole) {
    using Type = typename Wide<T>::Type;
    Wide<T>::unpack(Written ? read_again<Type>(from + span.at) : read_input<Type>(from + span.at),
                    x);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = j < span.count ? from[span.at + j] : T(0);
}

template <class T, int V>
__device__ __forceinline__ void write(T* to, const Span& span, const T (&x)[V]) {
  if (span.whole) {
    write_again(to + span.at, Wide<T>::pack(x));
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j < span.count) to[span.at + j] = x[j];
  }
}

// each(span) over the thread's elements of the chunk, in order.
template <class T, class Each>
__device__ __forceinline__ void over_chunk(std::int64_t n, std::int64_t chunk, std::int64_t which,
                                           bool aligned, const Each& each) {
  constexpr int kCount = Wide<T>::kCount;
  const std::int64_t begin = which * chunk, end = min(n, begin + chunk);
  for (std::int64_t i = begin + static_cast<int>(threadIdx.x) * kCount; i < end;
       i += kThreads * kCount) {
    const int count = end - i < kCount ? static_cast<int>(end - i) : kCount;
    each(Span{i, count, aligned && count == kCount});
  }
}

// The thread's share of a layer's partial sums, Stride apart.
template <int Stride>
__device__ __forceinline__ double share(const double* parts, std::int64_t chunks) {
  double sum = 0;
  for (std::int64_t j = static_cast<int>(threadIdx.x); j < chunks; j += kThreads)
    sum = sum + parts[j * Stride];
  return sum;
}

struct CgDot {
  const void *x, *y;
  double* parts;
};

// Grid of the three kernels: the chunks of the layers, one behind the other.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cg_dot_kernel(CgDot vectors, std::int64_t n, std::int64_t chunk, std::int64_t chunks,
                  bool aligned) {
  __shared__ double shared[1][kThreads];
  const std::int64_t block = blockIdx.x, layer = block / chunks;
  const T *x = static_cast<const T*>(vectors.x) + layer * n,
          *y = static_cast<const T*>(vectors.y) + layer * n;
  double sum[1] = {0};
  over_chunk<T>(n, chunk, block % chunks, aligned, [&](const Span& span) {
    T a[Wide<T>::kCount], b[Wide<T>::kCount];
    read<false>(x, span, a);
    read<false>(y, span, b);
#pragma unroll
    for (int j = 0; j < Wide<T>::kCount; ++j)
      sum[0] = sum[0] + static_cast<double>(a[j]) * static_cast<double>(b[j]);
  });
  block_sum(sum, shared);
  if (threadIdx.x == 0) vectors.parts[block] = sum[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cg_advance_kernel(CgAdvance vectors, std::int64_t n, std::int64_t chunk, std::int64_t chunks,
                      bool aligned) {
  __shared__ double before[3][kThreads], after[2][kThreads];
  const std::int64_t block = blockIdx.x, layer = block / chunks, which = block % chunks;
  const bool limits = vectors.directions != nullptr;
  double known[3] = {share<1>(vectors.curvatures + layer * chunks, chunks), 0, 0};
  if (limits) {
    known[1] = share<2>(vectors.directions + layer * chunks * 2, chunks);
    known[2] = share<2>(vectors.directions + layer * chunks * 2 + 1, chunks);
  }
  block_sum(known, before);

  CgState state = vectors.state[layer];
  const double alpha = advance(state, known[0], limits, known[1], known[2]);
  if (which == 0 && threadIdx.x == 0) vectors.state_out[layer] = state;

  T *step = static_cast<T*>(vectors.step) + layer * n, *r = static_cast<T*>(vectors.r) + layer * n;
  const T *p = static_cast<const T*>(vectors.p) + layer * n,
          *q = static_cast<const T*>(vectors.q) + layer * n;
  const T factor = static_cast<T>(alpha);
  const bool moving = factor != 0;  // a stopped layer may hold NaN in p and q
  double sum[2] = {0, 0};
  over_chunk<T>(n, chunk, which, aligned, [&](const Span& span) {
    constexpr int kCount = Wide<T>::kCount;
    T moved[kCount], rest[kCount];
    read<true>(step, span, moved);
    read<true>(r, span, rest);
    if (moving) {
      T along[kCount], image[kCount];
      read<false>(p, span, along);
      read<false>(q, span, image);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        moved[j] = moved[j] + factor * along[j];
        rest[j] = rest[j] - factor * image[j];
      }
      write(step, span, moved);
      write(r, span, rest);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sum[0] = sum[0] + static_cast<double>(rest[j]) * static_cast<double>(rest[j]);
      sum[1] = sum[1] + static_cast<double>(moved[j]) * static_cast<double>(moved[j]);
    }
  });
  // The elements past a layer's end count as 0 in `read`, and stay 0.
  block_sum(sum, after);
  if (threadIdx.x == 0) {
    vectors.sums[2 * block] = sum[0];
    vectors.sums[2 * block + 1] = sum[1];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cg_turn_kernel(CgTurn vectors, std::int64_t n, std::int64_t chunk, std::int64_t chunks,
                   bool aligned) {
  __shared__ double before[3][kThreads], after[2][kThreads];
  const std::int64_t block = blockIdx.x, layer = block / chunks, which = block % chunks;
  const bool limits = vectors.directions != nullptr;
  double known[3] = {share<2>(vectors.sums + layer * chunks * 2, chunks),
                     share<2>(vectors.sums + layer * chunks * 2 + 1, chunks), 0};
  if (vectors.followings != nullptr)
    known[2] = share<1>(vectors.followings + layer * chunks, chunks);
  block_sum(known, before);

  CgState state = vectors.state[layer];
  settle(state, known[0], known[1]);
  const double beta = turn(state, vectors.followings != nullptr ? known[2] : known[0]);
  if (which == 0 && threadIdx.x == 0) vectors.state_out[layer] = state;

  T* p = static_cast<T*>(vectors.p) + layer * n;
  const T *z = static_cast<const T*>(vectors.z) + layer * n,
          *step = static_cast<const T*>(vectors.step) + layer * n;
  const T factor = static_cast<T>(beta);
  const bool keeping = factor != 0;  // p may hold NaN where it is 0
  double sum[2] = {0, 0};
  over_chunk<T>(n, chunk, which, aligned, [&](const Span& span) {
    constexpr int kCount = Wide<T>::kCount;
    T next[kCount];
    read<false>(z, span, next);
    if (keeping) {
      T last[kCount];
      read<true>(p, span, last);
#pragma unroll
      for (int j = 0; j < kCount; ++j) next[j] = next[j] + factor * last[j];
    }
    write(p, span, next);
    if (limits) {
      T moved[kCount];
      read<false>(step, span, moved);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        sum[0] = sum[0] + static_cast<double>(next[j]) * static_cast<double>(next[j]);
        sum[1] = sum[1] + static_cast<double>(moved[j]) * static_cast<double>(next[j]);
      }
    }
  });
  if (!limits) return;
  block_sum(sum, after);
  if (threadIdx.x == 0) {
    vectors.directions[2 * block] = sum[0];
    vectors.directions[2 * block + 1] = sum[1];
  }
}

// Whether every row of every vector may be read 16 bytes at a time.
template <class... Vectors>
bool aligned(const CgShape& shape, Vectors... vectors) {
  std::uintptr_t all =
      shape.layers == 1 ? 0 : static_cast<std::uintptr_t>(shape.n) * size_of(shape.dtype);
  ((all |= reinterpret_cast<std::uintptr_t>(vectors)), ...);
  return all % 16 == 0;
}

unsigned blocks(const CgShape& shape) {
  if (shape.chunk <= 0 || shape.chunk % (4 * kThreads) != 0)
    throw std::invalid_argument("chunk=" + std::to_string(shape.chunk) +
                                " is not a positive multiple of 1024");
  const std::int64_t all = shape.layers * shape.chunks();
  if (shape.layers < 1 || shape.n < 0 || all > kMostBlocks)
    throw std::invalid_argument(std::to_string(shape.layers) + " layers of " +
                                std::to_string(shape.n) +
                                " elements are not a stack that one launch takes");
  return static_cast<unsigned>(all);
}

template <class Vectors>
using Kernel = void (*)(Vectors, std::int64_t, std::int64_t, std::int64_t, bool);

// The kernel for the shape's type, a block a chunk.
template <class Vectors>
void launch(const CgShape& shape, Kernel<Vectors> narrow, Kernel<Vectors> wide,
            const Vectors& vectors, bool aligned, Place place) {
  const unsigned grid = blocks(shape);
  if (shape.dtype != DType::kFloat32 && shape.dtype != DType::kFloat64)
    throw std::invalid_argument("conjugate gradient runs in float32 or float64");
  const DeviceGuard guard(place.device);
  const Kernel<Vectors> kernel = shape.dtype == DType::kFloat32 ? narrow : wide;
  PYMERGE_LAUNCH(kernel, dim3(grid), reinterpret_cast<cudaStream_t>(place.stream), vectors, shape.n,
                 shape.chunk, shape.chunks(), aligned);
}

}  // namespace

void cg_dot(const CgShape& shape, const void* x, const void* y, double* parts, Place place) {
  launch(shape, &cg_dot_kernel<float>, &cg_dot_kernel<double>, CgDot{x, y, parts},
         aligned(shape, x, y), place);
}

void cg_advance(const CgShape& shape, const CgAdvance& vectors, Place place) {
  launch(shape, &cg_advance_kernel<float>, &cg_advance_kernel<double>, vectors,
         aligned(shape, vectors.step, vectors.r, vectors.p, vectors.q), place);
}

void cg_turn(const CgShape& shape, const CgTurn& vectors, Place place) {
  launch(shape, &cg_turn_kernel<float>, &cg_turn_kernel<double>, vectors,
         aligned(shape, vectors.p, vectors.z, vectors.step), place);
}

}  // namespace pymerge::cuda
