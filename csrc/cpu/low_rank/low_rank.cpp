#include "cpu/low_rank/low_rank.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/core/levels.h"
#include "cpu/core/threads.h"

namespace pymerge::cpu {

namespace {

// Columns whose part of `right` is copied together, for all rows: of a matrix whose rows are a
// power of two apart, the elements of a column have few places in the first-level cache.
constexpr uint64_t kPanel = 256;

// left and right are aligned to their elements' size: NumPy allocates them. right: the columns
// [first, end), `stride` elements from one row to the next.
template <typename Work>
struct Job {
  const void* base;
  const Work* left;
  const Work* right;
  Work* out;
  uint64_t stride, rank, rows, columns;
  Work scale;
  uint64_t first, end;
};

namespace portable {
constexpr int kBytes = 16, kRows = 4, kGroups = 2;
#include "cpu/low_rank/low_rank_body.h"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
constexpr int kBytes = 32, kRows = 4, kGroups = 2;
#include "cpu/low_rank/low_rank_body.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
constexpr int kBytes = 64, kRows = 4, kGroups = 4;
#include "cpu/low_rank/low_rank_body.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <typename Work>
void run_at(const std::string& level, DType type, const Job<Work>& job) {
  const char* name = pick_level(level);
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return avx512::run(type, job);
  if (std::strcmp(name, "avx2") == 0) return avx2::run(type, job);
#endif
  (void)name;
  portable::run(type, job);
}

template <typename Work>
void run_panels(const std::string& level, DType type, const Job<Work>& whole) {
  std::vector<Work> packed(whole.rank * std::min(kPanel, whole.columns));
  Job<Work> job = whole;
  job.right = packed.data();
  for (job.first = 0; job.first < whole.columns; job.first = job.end) {
    job.end = std::min(job.first + kPanel, whole.columns);
    job.stride = job.end - job.first;
    for (uint64_t k = 0; k < whole.rank; ++k) {
      std::copy_n(whole.right + k * whole.stride + job.first, job.stride,
                  packed.data() + k * job.stride);
    }
    run_at(level, type, job);
  }
}

}  // namespace

void add_low_rank(const void* base, DType type, const void* left, const void* right,
                  uint64_t stride, uint64_t rank, double scale, bool wide, void* out, uint64_t rows,
                  uint64_t columns, const std::string& level) {
  if (rank == 0) throw std::invalid_argument("an update of rank 0");
  if (type == DType::kFloat64 && !wide) throw std::invalid_argument("a binary64 base is wide");
  const FloatEnvironment rounding;
  if (wide) {
    run_panels(
        level, type,
        Job<double>{base, static_cast<const double*>(left), static_cast<const double*>(right),
                    static_cast<double*>(out), stride, rank, rows, columns, scale, 0, columns});
  } else {
    run_panels(level, type,
               Job<float>{base, static_cast<const float*>(left), static_cast<const float*>(right),
                          static_cast<float*>(out), stride, rank, rows, columns, float(scale), 0,
                          columns});
  }
}

}  // namespace pymerge::cpu
