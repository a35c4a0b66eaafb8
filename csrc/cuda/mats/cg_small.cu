// Small layers of conjugate gradient, each whole in one block of threads (docs/spec/mats.md, M6 to
// M9): products, preconditioner, updates and decisions of all iterations in one launch. Matrices
// and vectors lie in device memory, where a block finds its own in the caches; an iteration reads
// A_k and the right inverse d_out / 64 times, B and the left one d_in / 64 times, rounded up.
// Products are of fp32 by fused multiply-adds, scalars binary64; the order of all sums depends on
// the shape alone.

#include <limits>
#include <stdexcept>

#include "cuda/core/runtime.h"
#include "cuda/mats/cg.cuh"

namespace pymerge::cuda {
namespace {

// A product's tile: kOwn x kOwn elements a thread; the factors come through shared memory kDepth at
// a time. Unmeasured.
constexpr int kOwn = 4, kSide = 64, kDepth = 16;
static_assert(kSide / kOwn * (kSide / kOwn) == kThreads);
constexpr int kFetched = kSide * kDepth / kThreads;  // elements of a factor, by one thread

// Up to this many rows an element of the right factor is read by the one thread that needs it.
// Unmeasured.
constexpr int kFlat = 4;

struct alignas(16) Tiles {
  float left[kDepth][kSide + 4];  // transposed; 4: fewer bank conflicts, and still 16 bytes
  float right[kDepth][kSide];
};

// The next tiles of the factors, in registers while the last ones are multiplied; 0 past the ends.
struct Next {
  float left[kFetched], right[kFetched];

  __device__ __forceinline__ void fetch(const float* x, const float* y, int row, int col, int depth,
                                        int rows, int inner, int cols) {
#pragma unroll
    for (int j = 0; j < kFetched; ++j) {
      const int e = static_cast<int>(threadIdx.x) + j * kThreads;
      const int i = row + e / kDepth, k = depth + e % kDepth;
      left[j] = i < rows && k < inner ? x[static_cast<std::int64_t>(i) * inner + k] : 0.0f;
      const int l = depth + e / kSide, c = col + e % kSide;
      right[j] = l < inner && c < cols ? y[static_cast<std::int64_t>(l) * cols + c] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(Tiles& tiles) const {
#pragma unroll
    for (int j = 0; j < kFetched; ++j) {
      const int e = static_cast<int>(threadIdx.x) + j * kThreads;
      tiles.left[e % kDepth][e / kDepth] = left[j];
      tiles.right[e / kSide][e % kSide] = right[j];
    }
  }
};

__device__ __forceinline__ void read(const float* four, float (&x)[kOwn]) {
  const float4 all = *reinterpret_cast<const float4*>(four);
  x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
}

__device__ __forceinline__ void tiled_product(const float* x, const float* y, float* out, int rows,
                                              int inner, int cols) {
  __shared__ Tiles buffer[2];  // one is read while the other is written
  constexpr int kAcross = kSide / kOwn;
  const int thread = static_cast<int>(threadIdx.x);
  const int own_row = thread / kAcross * kOwn, own_col = thread % kAcross * kOwn;
  int turn = 0;
  for (int row = 0; row < rows; row += kSide) {
    for (int col = 0; col < cols; col += kSide) {
      float total[kOwn][kOwn] = {};
      Next next;
      next.fetch(x, y, row, col, 0, rows, inner, cols);
      for (int depth = 0; depth < inner; depth += kDepth, turn ^= 1) {
        Tiles& tiles = buffer[turn];
        next.store(tiles);
        __syncthreads();
        next.fetch(x, y, row, col, depth + kDepth, rows, inner, cols);
#pragma unroll
        for (int k = 0; k < kDepth; ++k) {
          float a[kOwn], b[kOwn];
          read(&tiles.left[k][own_row], a);
          read(&tiles.right[k][own_col], b);
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) total[i][j] = __fmaf_rn(a[i], b[j], total[i][j]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int r = row + own_row + i;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          const int c = col + own_col + j;
          if (r < rows && c < cols) out[r * cols + c] = total[i][j];
        }
      }
    }
  }
}

// Up to kFlat rows and kThreads columns. A thread has one column; where they are few, several
// threads share a column's sum.
__device__ __forceinline__ void flat_product(const float* x, const float* y, float* out, int rows,
                                             int inner, int cols) {
  __shared__ float shared[kFlat][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  int width = 32;
  while (width < cols) width *= 2;
  const int sharers = kThreads / width, col = thread % width;
  float total[kFlat] = {};
  if (col < cols) {
#pragma unroll 4
    for (int k = thread / width; k < inner; k += sharers) {
      const float b = y[static_cast<std::int64_t>(k) * cols + col];
#pragma unroll
      for (int i = 0; i < kFlat; ++i) {
        if (i < rows) total[i] = __fmaf_rn(x[i * inner + k], b, total[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kFlat; ++i) shared[i][thread] = total[i];
  __syncthreads();
  for (int e = thread; e < rows * cols; e += kThreads) {
    const float* parts = &shared[e / cols][e % cols];
    float sum = parts[0];
    for (int j = 1; j < sharers; ++j) sum = sum + parts[j * width];
    out[e] = sum;
  }
}

// out = x y, row-major (rows, inner) and (inner, cols), by all threads. What they wrote of x and y
// lies behind a barrier, and out does at the end.
__device__ __forceinline__ void product(const float* x, const float* y, float* out, int rows,
                                        int inner, int cols) {
  if (rows <= kFlat)
    flat_product(x, y, out, rows, inner, cols);
  else
    tiled_product(x, y, out, rows, inner, cols);
  __syncthreads();
}

// A block a layer.
__global__ void __launch_bounds__(kThreads, 2) cg_small_kernel(CgSmall problem) {
  __shared__ double shared[3][kThreads];
  const int d_out = problem.d_out, d_in = problem.d_in, count = problem.count;
  const int n = d_out * d_in, thread = static_cast<int>(threadIdx.x);
  const std::int64_t layer = blockIdx.x;
  const bool outputs = problem.b != nullptr, limits = problem.limits;
  const int factors = problem.right == nullptr ? 0 : problem.left == nullptr ? 1 : 2;
  float *step = problem.step + layer * n, *r = problem.r + layer * n;
  float* p = problem.scratch + layer * n * (outputs ? 3 + count : 3);
  float *q = p + n, *z = factors > 0 ? q + n : r, *inner = q + 2 * n;
  const float* a = problem.a + layer * problem.a_stride;
  const float* b = outputs ? problem.b + layer * d_out * d_out * count : nullptr;
  const float* right = factors > 0 ? problem.right + layer * problem.right_stride : nullptr;
  const float* left = factors > 1 ? problem.left + layer * d_out * d_out : nullptr;

  CgState state = {};
  state.enough = problem.state[layer].enough;
  state.limit2 = problem.state[layer].limit2;
  state.tolerance = problem.state[layer].tolerance;
  double sizes[2] = {0, 0};
  for (int i = thread; i < n; i += kThreads) {
    const double rest = r[i], moved = step[i];
    sizes[0] = sizes[0] + rest * rest;
    sizes[1] = sizes[1] + moved * moved;
  }
  block_sum(sizes, shared);
  state.rr = sizes[0], state.dd = sizes[1];
  state.converged = state.rr <= state.enough ? 1 : 0;
  state.active = state.converged != 0 ? 0 : 1;

  // Every thread decides the same: they leave the loop together.
  for (int done = 0; done < problem.iterations && state.active != 0; ++done) {
    for (int k = 0; k < factors; ++k) {  // M7
      const bool first = k == 0;
      product(first ? r : left, first ? right : inner, k + 1 < factors ? inner : z, d_out,
              first ? d_in : d_out, d_in);
    }
    double following[1] = {0};
    for (int i = thread; i < n; i += kThreads)
      following[0] = following[0] + static_cast<double>(r[i]) * static_cast<double>(z[i]);
    block_sum(following, shared);
    if (done == 0) state.rho = following[0];
    const float beta = done == 0 ? 0.0f : static_cast<float>(turn(state, following[0]));
    for (int i = thread; i < n; i += kThreads) p[i] = done == 0 ? z[i] : z[i] + beta * p[i];
    __syncthreads();

    const int products = outputs ? count + 1 : 1;
    for (int k = 0; k < products; ++k) {  // M1
      const bool last = k + 1 == products, second = last && outputs;
      product(second ? b : p, second ? inner : a + static_cast<std::int64_t>(k) * d_in * d_in,
              last ? q : inner + static_cast<std::int64_t>(k) * n, d_out,
              second ? count * d_out : d_in, d_in);
    }
    double along[3] = {0, 0, 0};
    for (int i = thread; i < n; i += kThreads) {
      const double ahead = p[i];
      along[0] = along[0] + ahead * static_cast<double>(q[i]);
      if (limits) {
        along[1] = along[1] + ahead * ahead;
        along[2] = along[2] + static_cast<double>(step[i]) * ahead;
      }
    }
    block_sum(along, shared);
    const float alpha = static_cast<float>(advance(state, along[0], limits, along[1], along[2]));
    if (state.active == 0) break;
    sizes[0] = sizes[1] = 0;
    for (int i = thread; i < n; i += kThreads) {
      const float moved = step[i] + alpha * p[i], rest = r[i] - alpha * q[i];
      step[i] = moved;
      r[i] = rest;
      sizes[0] = sizes[0] + static_cast<double>(rest) * static_cast<double>(rest);
      sizes[1] = sizes[1] + static_cast<double>(moved) * static_cast<double>(moved);
    }
    block_sum(sizes, shared);
    settle(state, sizes[0], sizes[1]);
  }
  if (thread == 0) problem.state[layer] = state;
}

}  // namespace

void cg_small(const CgSmall& problem, Place place) {
  constexpr int kMost = std::numeric_limits<std::int32_t>::max();
  const int longest = problem.d_out > problem.d_in ? problem.d_out : problem.d_in;
  const int shortest = problem.d_out > problem.d_in ? problem.d_in : problem.d_out;
  if (shortest < 1 || longest > kThreads)
    throw std::invalid_argument("layers of " + std::to_string(problem.d_out) + " x " +
                                std::to_string(problem.d_in) +
                                " are not between 1 x 1 and 256 x 256");
  if (problem.layers < 1 || problem.layers > kMost || problem.count < 1 ||
      problem.count > kMost / kThreads)
    throw std::invalid_argument(std::to_string(problem.layers) + " layers of " +
                                std::to_string(problem.count) +
                                " models are not a stack that one launch takes");
  if (problem.left != nullptr && (problem.right == nullptr || problem.b == nullptr))
    throw std::invalid_argument("left is given, but not right and b");
  const DeviceGuard guard(place.device);
  const auto kernel = &cg_small_kernel;
  PYMERGE_LAUNCH(kernel, dim3(static_cast<unsigned>(problem.layers)),
                 reinterpret_cast<cudaStream_t>(place.stream), problem);
}

}  // namespace pymerge::cuda
