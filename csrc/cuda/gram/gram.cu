// Dot products of task vectors and their combinations (G2 to G5). A block of threads takes a part
// of a row, or a part of kThreads columns; each thread holds all its sums in registers, in
// binary64. The sums of parts are added in order by a second launch: nothing depends on how blocks
// are scheduled. Bytes moved: one read of the inputs (and of the base) each, one write of the
// combination.

#include "cuda/gram/gram.h"

#include <limits>
#include <stdexcept>

#include "cuda/core/runtime.h"

namespace pymerge::cuda {
namespace {

constexpr std::int64_t kRowPart = 16384;    // elements of a row that a block adds up
constexpr std::int64_t kColumnPart = 1024;  // rows, of columns
constexpr int kMost = 8;                    // models whose pairs a thread holds at once
constexpr int kSide = 4;                    // models of a pair of groups, where there are more
constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

// Which pairs a launch adds up: models first .. first + count - 1 with one another, or with those
// from `second` on.
struct Pairs {
  int first, count, second, second_count;
};

__device__ __forceinline__ int pairs_of(int models) { return models * (models + 1) / 2; }
__device__ __forceinline__ int pair_of(int models, int i, int j) {
  return i * models - i * (i - 1) / 2 + j - i;
}

// Elements i .. i + count - 1 of `size` models from `first` on, less the base's; 0 for what is not
// there.
template <class F, int N>
__device__ __forceinline__ void read_models(const GramCall& call, int first, int size,
                                            std::int64_t i, int count, const F (&base)[kWidth],
                                            F (&x)[N][kWidth]) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k >= size) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[k][j] = F(0);
      continue;
    }
    const GramInput input = call.table[first + k];
    load<F>(reinterpret_cast<const void*>(input.address), static_cast<DType>(input.dtype),
            call.aligned, i, count, x[k]);
    if (call.has_base) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[k][j] = j < count ? x[k][j] - base[j] : F(0);
    }
  }
}

template <class F>
__device__ __forceinline__ void read_base(const GramCall& call, std::int64_t i, int count,
                                          F (&base)[kWidth]) {
  if (!call.has_base) return;
  const GramInput input = call.table[call.models];
  load<F>(reinterpret_cast<const void*>(input.address), static_cast<DType>(input.dtype),
          call.aligned, i, count, base);
}

// The sum of one number of each of the block's first `active` threads, in thread 0; all threads
// take part.
__device__ __forceinline__ double block_total(double value, int active, double* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  __syncthreads();
  int most = kThreads / 2;
  while (most >= active) most /= 2;  // 0 for one thread
  for (int width = most; width > 0; width /= 2) {
    if (thread < width) shared[thread] = shared[thread] + shared[thread + width];
    __syncthreads();
  }
  const double total = shared[0];
  __syncthreads();
  return total;
}

// Adds the products of a thread's elements. Diagonal: the pairs of one group, else of two.
template <class F, int N, bool Diagonal, int Width>
__device__ __forceinline__ void add_products(const F (&x)[N][Width], const F (&y)[N][Width],
                                             double (&sums)[N][N]) {
#pragma unroll
  for (int a = 0; a < N; ++a) {
#pragma unroll
    for (int b = Diagonal ? a : 0; b < N; ++b) {
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        sums[a][b] = sums[a][b] + static_cast<double>(x[a][j]) *
                                      static_cast<double>(Diagonal ? x[b][j] : y[b][j]);
      }
    }
  }
}

// Grid: the parts of all rows.
template <class F, int N, bool Diagonal>
__global__ void __launch_bounds__(kThreads)
    gram_rows_kernel(GramCall call, Pairs pairs, std::int64_t parts, double* sums_out) {
  __shared__ double shared[kThreads];
  const std::int64_t block = blockIdx.x, row = block / parts, part = block % parts;
  const std::int64_t end = min(call.columns, (part + 1) * kRowPart), offset = row * call.columns;
  double sums[N][N] = {};
  for (std::int64_t c = part * kRowPart + static_cast<int>(threadIdx.x) * kWidth; c < end;
       c += kThreads * kWidth) {
    const int count = available(c, end);
    F base[kWidth], x[N][kWidth], y[N][kWidth];
    read_base<F>(call, offset + c, count, base);
    read_models<F, N>(call, pairs.first, pairs.count, offset + c, count, base, x);
    if (!Diagonal)
      read_models<F, N>(call, pairs.second, pairs.second_count, offset + c, count, base, y);
    add_products<F, N, Diagonal, kWidth>(x, y, sums);
  }
  // Of a short row, few threads have anything.
  const std::int64_t had = (end - part * kRowPart + kWidth - 1) / kWidth;
  const int active = had < 1 ? 1 : had < kThreads ? static_cast<int>(had) : kThreads;
  double* to = sums_out + (part * call.rows + row) * pairs_of(call.models);
#pragma unroll
  for (int a = 0; a < N; ++a) {
#pragma unroll
    for (int b = Diagonal ? a : 0; b < N; ++b) {
      if (a >= pairs.count || b >= (Diagonal ? pairs.count : pairs.second_count)) continue;
      const double total = block_total(sums[a][b], active, shared);
      if (threadIdx.x == 0)
        to[pair_of(call.models, pairs.first + a, (Diagonal ? pairs.first : pairs.second) + b)] =
            total;
    }
  }
}

// Grid: strips of kThreads columns, by parts of rows; a thread has a column.
// Compiled for one block a multiprocessor: left to itself, ptxas spills 8 bytes of four models in
// binary64 to fit another (nvcc 13.0, sm_90).
template <class F, int N, bool Diagonal>
__global__ void __launch_bounds__(kThreads, 1)
    gram_columns_kernel(GramCall call, Pairs pairs, std::int64_t strips, double* sums_out) {
  const std::int64_t block = blockIdx.x, part = block / strips;
  const std::int64_t column = block % strips * kThreads + static_cast<int>(threadIdx.x);
  if (column >= call.columns) return;
  const std::int64_t end = min(call.rows, (part + 1) * kColumnPart);
  const auto element = [&](int k, std::int64_t i) {
    const GramInput input = call.table[k];
    return load_element<F>(reinterpret_cast<const void*>(input.address),
                           static_cast<DType>(input.dtype), i);
  };
  double sums[N][N] = {};
  for (std::int64_t row = part * kColumnPart; row < end; ++row) {
    const std::int64_t i = row * call.columns + column;
    const F base = call.has_base ? element(call.models, i) : F(0);
    F x[N][1], y[N][1];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x[k][0] = k < pairs.count ? element(pairs.first + k, i) : F(0);
      if (call.has_base && k < pairs.count) x[k][0] = x[k][0] - base;
      if (Diagonal) continue;
      y[k][0] = k < pairs.second_count ? element(pairs.second + k, i) : F(0);
      if (call.has_base && k < pairs.second_count) y[k][0] = y[k][0] - base;
    }
    add_products<F, N, Diagonal, 1>(x, y, sums);
  }
  double* to = sums_out + (part * call.columns + column) * pairs_of(call.models);
#pragma unroll
  for (int a = 0; a < N; ++a) {
#pragma unroll
    for (int b = Diagonal ? a : 0; b < N; ++b) {
      if (a >= pairs.count || b >= (Diagonal ? pairs.count : pairs.second_count)) continue;
      to[pair_of(call.models, pairs.first + a, (Diagonal ? pairs.first : pairs.second) + b)] =
          sums[a][b];
    }
  }
}

// out[j] = the sum of sums[part][j] over the parts, in order.
__global__ void __launch_bounds__(kThreads)
    gram_total_kernel(const double* sums, std::int64_t parts, std::int64_t size, double* out) {
  const std::int64_t j =
      static_cast<std::int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (j >= size) return;
  double total = 0;
  for (std::int64_t part = 0; part < parts; ++part) total = total + sums[part * size + j];
  out[j] = total;
}

// Grid: kThreads * kWidth elements of the tensor a block.
template <class F>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(GramCall call, const double* coefficients, void* out, DType out_dtype,
                   bool out_aligned) {
  const std::int64_t n = call.rows * call.columns;
  const std::int64_t i =
      (static_cast<std::int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kWidth;
  if (i >= n) return;
  const int count = available(i, n);
  const std::int64_t row = i / call.columns, column = i % call.columns;
  F base[kWidth], sum[kWidth] = {};
  read_base<F>(call, i, count, base);
  for (int k = 0; k < call.models; ++k) {
    F x[1][kWidth];
    read_models<F, 1>(call, k, 1, i, count, base, x);
    std::int64_t r = row, c = column;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (j >= count) break;
      const F factor = static_cast<F>(coefficients[(call.by_column ? c : r) * call.models + k]);
      sum[j] = sum[j] + factor * x[0][j];
      if (++c == call.columns) c = 0, ++r;
    }
  }
  if (call.has_base) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] = j < count ? base[j] + sum[j] : sum[j];
  }
  store<F>(out, out_dtype, out_aligned, i, count, sum);
}

template <class F, int N, bool Diagonal>
void launch_products(const GramCall& call, const Pairs& pairs, double* sums, cudaStream_t stream) {
  const std::int64_t parts = call.parts();
  const std::int64_t strips = (call.columns + kThreads - 1) / kThreads;
  const std::int64_t blocks = call.by_column ? strips * parts : call.rows * parts;
  if (blocks > kMostBlocks) throw std::invalid_argument("gram: too many rows for one launch");
  const dim3 grid(static_cast<unsigned>(blocks));
  if (call.by_column) {
    const auto kernel = gram_columns_kernel<F, N, Diagonal>;
    PYMERGE_LAUNCH(kernel, grid, stream, call, pairs, strips, sums);
  } else {
    const auto kernel = gram_rows_kernel<F, N, Diagonal>;
    PYMERGE_LAUNCH(kernel, grid, stream, call, pairs, parts, sums);
  }
}

template <class F>
void products(const GramCall& call, double* sums, cudaStream_t stream) {
  const int models = call.models;
  if (models <= kMost) {
    const Pairs all{0, models, 0, 0};
    if (models == 1) return launch_products<F, 1, true>(call, all, sums, stream);
    if (models == 2) return launch_products<F, 2, true>(call, all, sums, stream);
    if (models <= 4) return launch_products<F, 4, true>(call, all, sums, stream);
    return launch_products<F, kMost, true>(call, all, sums, stream);
  }
  for (int i = 0; i < models; i += kSide) {
    const int count = min(kSide, models - i);
    launch_products<F, kSide, true>(call, Pairs{i, count, 0, 0}, sums, stream);
    for (int j = i + kSide; j < models; j += kSide) {
      const Pairs pairs{i, count, j, min(kSide, models - j)};
      launch_products<F, kSide, false>(call, pairs, sums, stream);
    }
  }
}

}  // namespace

std::int64_t GramCall::parts() const {
  const std::int64_t along = by_column ? rows : columns, each = by_column ? kColumnPart : kRowPart;
  return along <= each ? 1 : (along + each - 1) / each;
}

void gram(const GramCall& call, double* sums, double* out, Place place) {
  const DeviceGuard guard(place.device);
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  const std::int64_t size = call.groups() * call.pairs();
  if (size == 0) return;
  if (call.wide) {
    products<double>(call, sums, stream);
  } else {
    products<float>(call, sums, stream);
  }
  const std::int64_t blocks = (size + kThreads - 1) / kThreads;
  if (blocks > kMostBlocks) throw std::invalid_argument("gram: too many sums for one launch");
  const dim3 grid(static_cast<unsigned>(blocks));
  PYMERGE_LAUNCH(gram_total_kernel, grid, stream, sums, call.parts(), size, out);
}

void combine(const GramCall& call, const double* coefficients, void* out, DType out_dtype,
             bool out_aligned, Place place) {
  const DeviceGuard guard(place.device);
  const auto stream = reinterpret_cast<cudaStream_t>(place.stream);
  const std::int64_t n = call.rows * call.columns;
  if (n == 0) return;
  const std::int64_t each = kThreads * kWidth, blocks = (n + each - 1) / each;
  if (blocks > kMostBlocks)
    throw std::invalid_argument("combine: too many elements for one launch");
  const dim3 grid(static_cast<unsigned>(blocks));
  if (call.wide) {
    const auto kernel = combine_kernel<double>;
    PYMERGE_LAUNCH(kernel, grid, stream, call, coefficients, out, out_dtype, out_aligned);
  } else {
    const auto kernel = combine_kernel<float>;
    PYMERGE_LAUNCH(kernel, grid, stream, call, coefficients, out, out_dtype, out_aligned);
  }
}

}  // namespace pymerge::cuda
