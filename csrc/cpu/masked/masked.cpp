#include "cpu/masked/masked.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/ties.h"
#include "cpu/core/levels.h"
#include "cpu/core/threads.h"

namespace pymerge::cpu {

namespace {

constexpr uint64_t kBlock =
    512;  // elements at a time, of which a dozen arrays stay in the L1 cache
constexpr uint64_t kLanes = 64, kChunk = 16384;  // P6
constexpr uint64_t kTask = uint64_t(1) << 16;    // elements: a stretch of every input
// Below this many elements, waking the workers costs more than they save.
constexpr uint64_t kAlone = uint64_t(1) << 15;

template <class Work>
struct Loops {
  void (*keys)(const MaskedInputs&, const MaskedKey&, uint64_t, uint64_t, Key<Work>*);
  uint64_t (*nonzero)(const MaskedInputs&, const MaskedKey&, uint64_t, uint64_t);
  void (*energies)(const MaskedInputs&, const MaskedRule&, uint64_t, uint64_t, double*);
  void (*overlaps)(const MaskedInputs&, double, uint64_t, uint64_t, uint64_t*, uint64_t*);
  void (*divergences)(const MaskedInputs&, uint64_t, uint64_t, uint64_t, Work*);
  void (*exact_divergences)(const MaskedInputs&, uint64_t, uint64_t, uint64_t, Work*);
  void (*merge)(const MaskedInputs&, const MaskedRule&, uint64_t, uint64_t, void*, DType,
                MaskedStats&);
};

namespace portable {
#include "cpu/masked/masked_body.h"
// After it.
#include "cpu/masked/divergence_body.h"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu/masked/masked_body.h"
// After it.
#include "cpu/masked/divergence_body.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "cpu/masked/masked_body.h"
// After it.
#include "cpu/masked/divergence_body.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class Work>
const Loops<Work>& loops(const std::string& level) {
  const char* name = pick_level(level);
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return avx512::loops<Work>();
  if (std::strcmp(name, "avx2") == 0) return avx2::loops<Work>();
#endif
  (void)name;
  return portable::loops<Work>();
}

// body(thread, begin, end) over all elements, `step` at a time.
template <class Body>
void over(const MaskedInputs& in, uint64_t step, const Body& body) {
  const int threads = in.n < kAlone ? 1 : in.threads;
  parallel_for(threads, (in.n + step - 1) / step, [&](int thread, uint64_t task) {
    body(thread, task * step, std::min(in.n, (task + 1) * step));
  });
}

// run(Work()) for the working precision.
template <class Run>
auto in_working_precision(bool wide, const Run& run) {
  return wide ? run(double()) : run(float());
}

}  // namespace

template <class Work>
void masked_keys(const MaskedInputs& in, const MaskedKey& key, uint64_t i, uint64_t count,
                 Key<Work>* dst) {
  loops<Work>(in.level).keys(in, key, i, count, dst);
}
template void masked_keys<float>(const MaskedInputs&, const MaskedKey&, uint64_t, uint64_t,
                                 uint32_t*);
template void masked_keys<double>(const MaskedInputs&, const MaskedKey&, uint64_t, uint64_t,
                                  uint64_t*);

uint64_t masked_nonzero(const MaskedInputs& in, const MaskedKey& key) {
  std::vector<uint64_t> found(static_cast<size_t>(in.threads));
  in_working_precision(in.wide, [&](auto work) {
    const auto& run = loops<decltype(work)>(in.level);
    over(in, kTask, [&](int thread, uint64_t begin, uint64_t end) {
      found[size_t(thread)] += run.nonzero(in, key, begin, end);
    });
  });
  uint64_t total = 0;
  for (const uint64_t each : found) total += each;
  return total;
}

std::vector<double> masked_energies(const MaskedInputs& in, const MaskedRule& rule) {
  const size_t models = in.models.size();
  const uint64_t chunks = (in.n + kChunk - 1) / kChunk;
  std::vector<double> sums(models * chunks), totals(models);
  in_working_precision(in.wide, [&](auto work) {
    const auto& run = loops<decltype(work)>(in.level);
    over(in, kChunk, [&](int, uint64_t begin, uint64_t end) {
      run.energies(in, rule, begin, end, sums.data() + begin / kChunk * models);
    });
  });
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    for (size_t k = 0; k < models; ++k) totals[k] += sums[chunk * models + k];
  }
  return totals;
}

std::vector<std::pair<uint64_t, uint64_t>> masked_overlaps(const MaskedInputs& in, double epsilon) {
  const size_t models = in.models.size(), threads = size_t(in.threads);
  std::vector<uint64_t> shared(models * threads), alone(models * threads);
  in_working_precision(in.wide, [&](auto work) {
    const auto& run = loops<decltype(work)>(in.level);
    over(in, kTask, [&](int thread, uint64_t begin, uint64_t end) {
      const size_t own = size_t(thread) * models;
      run.overlaps(in, epsilon, begin, end, shared.data() + own, alone.data() + own);
    });
  });
  std::vector<std::pair<uint64_t, uint64_t>> totals(models);
  for (size_t i = 0; i < shared.size(); ++i) {
    totals[i % models].first += shared[i];
    totals[i % models].second += alone[i];
  }
  return totals;
}

double masked_divergences(const MaskedInputs& in, uint64_t row, bool exact, void* out) {
  const uint64_t rows = in.n / row, step = std::max<uint64_t>(1, kTask / row);
  double least = 0;
  in_working_precision(in.wide, [&](auto work) {
    using Work = decltype(work);
    const auto& table = loops<Work>(in.level);
    const auto run = exact ? table.exact_divergences : table.divergences;
    Work* to = static_cast<Work*>(out);
    const int threads = in.n < kAlone ? 1 : in.threads;
    parallel_for(threads, (rows + step - 1) / step, [&](int, uint64_t task) {
      run(in, row, task * step, std::min(rows, (task + 1) * step), to);
    });
    if (rows > 0) least = double(*std::min_element(to, to + rows));
  });
  return least;
}

MaskedStats masked(const MaskedInputs& in, const MaskedRule& rule, void* out, DType out_type) {
  const size_t models = in.models.size();
  MaskedStats none;
  none.kept.resize(models);
  none.non_finite.resize(models);
  std::vector<MaskedStats> parts(static_cast<size_t>(in.threads), none);
  in_working_precision(in.wide, [&](auto work) {
    const auto& run = loops<decltype(work)>(in.level);
    over(in, kTask, [&](int thread, uint64_t begin, uint64_t end) {
      run.merge(in, rule, begin, end, out, out_type, parts[size_t(thread)]);
    });
  });
  MaskedStats total = none;
  for (const MaskedStats& part : parts) {
    total.conflicts += part.conflicts;
    for (size_t k = 0; k < models; ++k) {
      total.kept[k] += part.kept[k];
      total.non_finite[k] += part.non_finite[k];
    }
  }
  return total;
}

}  // namespace pymerge::cpu
