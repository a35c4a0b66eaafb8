// Runs CUDA kernels on the host, one block after the other, a block's threads as fibers of one OS
// thread that change places only at barriers and warp exchanges. Enough of CUDA for csrc/cuda, and
// deterministic: a logic error shows without a GPU. It proves neither memory ordering between
// blocks nor speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using std::fabs;
using std::max;
using std::min;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
// An access of a device is aligned to its size.
template <class V>
V* aligned_access(V* at) {
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(V) != 0) {
    std::fprintf(stderr, "emulation: a misaligned access of %zu bytes\n", sizeof(V));
    std::abort();
  }
  return at;
}
template <class V>
V __ldg(const V* from) {
  return *aligned_access(from);
}
template <class V>
V __ldcg(const V* from) {
  return *aligned_access(from);
}
template <class V>
void __stcs(V* to, V value) {
  *aligned_access(to) = value;
}
template <class V>
void __stcg(V* to, V value) {
  *aligned_access(to) = value;
}
using cudaStream_t = void*;

namespace emulate {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 << 10;

struct Block;
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  bool waiting = false;  // at a barrier of the block
  std::uint64_t warp_phase = 0;
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  std::function<void()> body;
  int running = 0;
  int arrived = 0;
  // One exchange a warp at a time: each lane leaves its value and waits for the others.
  std::vector<std::uint64_t> lane_value;
  std::vector<int> warp_arrived;
  std::vector<std::uint64_t> warp_phase;
};

inline Block*& current() {
  static Block* block = nullptr;
  return block;
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index& block_index() {
  static Index i;
  return i;
}
inline Index& grid_size() {
  static Index i;
  return i;
}
inline Index& block_size() {
  static Index i;
  return i;
}
inline Index thread_index() { return {static_cast<unsigned>(current()->running), 0, 0}; }

inline void yield() {
  Block& block = *current();
  swapcontext(&block.threads[block.running].context, &block.scheduler);
}

inline void barrier() {
  Block& block = *current();
  block.threads[block.running].waiting = true;
  ++block.arrived;
  while (block.threads[block.running].waiting) yield();
}

// Every lane of the warp gets the values of all; two rounds, so that no lane overwrites before all
// have read.
inline void warp_barrier() {
  Block& block = *current();
  const int warp = block.running / kWarp;
  const std::uint64_t phase = block.warp_phase[warp];
  if (++block.warp_arrived[warp] == kWarp) {
    block.warp_arrived[warp] = 0;
    ++block.warp_phase[warp];
    return;
  }
  while (block.warp_phase[warp] == phase) yield();
}

inline std::uint64_t exchange(std::uint64_t value, int from_lane) {
  Block& block = *current();
  const int me = block.running;
  block.lane_value[me] = value;
  warp_barrier();
  const std::uint64_t got = block.lane_value[me / kWarp * kWarp + from_lane];
  warp_barrier();
  return got;
}

inline void entry() {
  Block& block = *current();
  const int me = block.running;
  block.body();
  block.threads[me].done = true;
  swapcontext(&block.threads[me].context, &block.scheduler);
}

inline void run_block(Block& block) {
  current() = &block;
  const int count = static_cast<int>(block.threads.size());
  for (int j = 0; j < count; ++j) {
    Thread& thread = block.threads[j];
    thread.done = thread.waiting = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
  }
  block.arrived = 0;
  std::fill(block.warp_arrived.begin(), block.warp_arrived.end(), 0);
  int left = count;
  while (left > 0) {
    bool moved = false;
    for (int j = 0; j < count; ++j) {
      Thread& thread = block.threads[j];
      if (thread.done || thread.waiting) continue;
      block.running = j;
      swapcontext(&block.scheduler, &thread.context);
      moved = true;
      if (thread.done) --left;
    }
    if (block.arrived > 0 &&
        block.arrived == left) {  // CUDA: threads that have left count as arrived
      block.arrived = 0;
      for (Thread& thread : block.threads) thread.waiting = false;
      moved = true;
    }
    if (!moved) {
      std::fprintf(stderr, "emulation: a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

inline long& launches() {
  static long count = 0;
  return count;
}

// Blocks run in a shuffled order: a kernel whose result depended on it would be caught.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, int threads, Args... args) {
  static std::mt19937_64 random(12345);
  static Block block;
  ++launches();
  if (block.threads.empty()) {
    block.threads.resize(static_cast<std::size_t>(threads));
    for (Thread& thread : block.threads) thread.stack.resize(kStack);
    block.lane_value.resize(static_cast<std::size_t>(threads));
    block.warp_arrived.resize(static_cast<std::size_t>(threads) / kWarp);
    block.warp_phase.resize(static_cast<std::size_t>(threads) / kWarp);
  }
  if (grid.x == 0 || grid.y == 0) throw std::runtime_error("CUDA: an empty grid");
  block.body = [&] { kernel(args...); };
  grid_size() = {grid.x, grid.y, grid.z};
  block_size() = {static_cast<unsigned>(threads), 1, 1};
  std::vector<unsigned> order(static_cast<std::size_t>(grid.x) * grid.y);
  for (std::size_t j = 0; j < order.size(); ++j) order[j] = static_cast<unsigned>(j);
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned j : order) {
    block_index() = {j % grid.x, j / grid.x, 0};
    run_block(block);
  }
}

}  // namespace emulate

#define threadIdx (::emulate::thread_index())
#define blockIdx (::emulate::block_index())
#define gridDim (::emulate::grid_size())
#define blockDim (::emulate::block_size())

inline void __syncthreads() { ::emulate::barrier(); }
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __uint_as_float(unsigned x) {
  float f;
  __builtin_memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  __builtin_memcpy(&x, &f, 4);
  return x;
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
  const int lane = ::emulate::current()->running % ::emulate::kWarp;
  return static_cast<unsigned>(::emulate::exchange(value, lane ^ mask));
}

template <class T>
T atomicAdd(T* where, T value) {
  const T before = *where;
  *where = before + value;
  return before;
}
template <class T>
T atomicMin(T* where, T value) {
  const T before = *where;
  if (value < before) *where = value;
  return before;
}
template <class T>
T atomicMax(T* where, T value) {
  const T before = *where;
  if (value > before) *where = value;
  return before;
}

#define PYMERGE_LAUNCH(kernel, grid, stream, ...) \
  ((void)(stream), ::emulate::launch((kernel), (grid), ::pymerge::cuda::kThreads, __VA_ARGS__))
