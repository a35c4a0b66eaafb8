#include "cpu/mats/cg.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/core/levels.h"
#include "cpu/core/threads.h"

namespace pymerge::cpu {

namespace {

constexpr uint64_t kLanes = 16;
constexpr uint64_t kChunk =
    16384;  // elements a task; a sum over a layer adds the sums of its chunks in order
constexpr uint64_t kAlone =
    uint64_t(1)
    << 18;  // below this many elements in all, waking the workers costs more than they save

using Pair = std::pair<double, double>;

template <typename T>
struct Loops {
  double (*dot)(const T*, const T*, uint64_t);
  Pair (*advance)(T*, T*, const T*, const T*, T, uint64_t);
  Pair (*turn)(T*, const T*, const T*, T, uint64_t);
};

namespace portable {
#include "cpu/mats/cg_body.h"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "cpu/mats/cg_body.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "cpu/mats/cg_body.h"
}
#pragma GCC pop_options
#endif

template <typename T>
const Loops<T>& loops(const std::string& level) {
  const char* name = pick_level(level);
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return avx512::loops<T>();
  if (std::strcmp(name, "avx2") == 0) return avx2::loops<T>();
#endif
  (void)name;
  return portable::loops<T>();
}

// body(layer, first element, elements) -> Pair for every chunk; the pairs of a layer are added in
// order.
template <typename Body>
std::vector<Pair> over_chunks(const CgShape& shape, const Body& body) {
  const uint64_t chunks = (shape.n + kChunk - 1) / kChunk;
  std::vector<Pair> parts(shape.layers * chunks);
  const int threads = shape.layers * shape.n < kAlone ? 1 : shape.threads;
  parallel_for(threads, parts.size(), [&](int, uint64_t task) {
    const uint64_t at = task % chunks * kChunk;
    parts[task] = body(task / chunks, at, std::min(kChunk, shape.n - at));
  });
  std::vector<Pair> sums(shape.layers);
  for (uint64_t task = 0; task < parts.size(); ++task) {
    sums[task / chunks].first += parts[task].first;
    sums[task / chunks].second += parts[task].second;
  }
  return sums;
}

}  // namespace

template <typename T>
std::vector<double> cg_dot(const CgShape& shape, const T* x, const T* y) {
  const Loops<T>& run = loops<T>(shape.level);
  const auto sums = over_chunks(shape, [&](uint64_t layer, uint64_t at, uint64_t count) {
    const uint64_t i = layer * shape.n + at;
    return Pair{run.dot(x + i, y + i, count), 0};
  });
  std::vector<double> result;
  for (const Pair& sum : sums) result.push_back(sum.first);
  return result;
}

template <typename T>
std::vector<Pair> cg_advance(const CgShape& shape, T* step, T* r, const T* p, const T* q,
                             const std::vector<double>& alpha) {
  const Loops<T>& run = loops<T>(shape.level);
  return over_chunks(shape, [&](uint64_t layer, uint64_t at, uint64_t count) {
    const uint64_t i = layer * shape.n + at;
    const T factor = T(alpha[layer]);
    // A stopped layer may hold NaN in p and q, so it is not enough to add 0 times them.
    if (factor == 0) return Pair{run.dot(r + i, r + i, count), run.dot(step + i, step + i, count)};
    return run.advance(step + i, r + i, p + i, q + i, factor, count);
  });
}

template <typename T>
std::vector<Pair> cg_turn(const CgShape& shape, T* p, const T* z, const T* step,
                          const std::vector<double>& beta) {
  const Loops<T>& run = loops<T>(shape.level);
  return over_chunks(shape, [&](uint64_t layer, uint64_t at, uint64_t count) {
    const uint64_t i = layer * shape.n + at;
    return run.turn(p + i, z + i, step + i, T(beta[layer]), count);
  });
}

#define PYMERGE_CG(T)                                                                  \
  template std::vector<double> cg_dot<T>(const CgShape&, const T*, const T*);          \
  template std::vector<Pair> cg_advance<T>(const CgShape&, T*, T*, const T*, const T*, \
                                           const std::vector<double>&);                \
  template std::vector<Pair> cg_turn<T>(const CgShape&, T*, const T*, const T*,        \
                                        const std::vector<double>&)

PYMERGE_CG(float);
PYMERGE_CG(double);

}  // namespace pymerge::cpu
