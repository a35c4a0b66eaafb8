#include "cpu/gram/gram.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
// GCC 12 takes the undefined pass-through operands of its own intrinsics for uninitialised
// variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "cpu/core/levels.h"
#include "cpu/core/threads.h"

namespace pymerge::cpu {

namespace {

constexpr uint64_t kChunk = 16384;    // G2: elements whose products are added up together
constexpr unsigned kBlock = 1024;     // of them, so many are converted at a time: 4 KB a model
constexpr uint64_t kRowBlock = 4096;  // G3: rows
constexpr uint64_t kStrip = 1024;     // columns that a task of G3 takes: of a row a page, or less
constexpr uint64_t kLeastStrip = 256;
constexpr unsigned kRows = 8;  // rows whose products are added up in registers
static_assert(kStrip <= kBlock);
// Outputs of so many bytes are stored past the caches.
constexpr uint64_t kStreamBytes = uint64_t(1) << 22;
constexpr uint64_t kAlone = 1 << 18;  // elements below which waking the workers costs more

int pairs_of(int count) { return count * (count + 1) / 2; }
int pair_of(int count, int i, int j) { return i * count - i * (i - 1) / 2 + j - i; }

// One thread's memory. size: floats for each model.
struct Room {
  Room(int count, uint64_t size)
      : size(size),
        scratch_(new float[(count + 1) * size + kBlock + 16]),
        lanes_(new double[16 * pairs_of(count) + 8]),
        from_(new const float*[count]),
        wide_(new Buffer[count]) {
    const auto aligned = [](auto* p) {
      return reinterpret_cast<decltype(p)>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
    };
    held = aligned(scratch_.get());
    lanes = aligned(lanes_.get());
    from = from_.get();
    wide = wide_.get();
  }
  // Of model k; in a combination of model k - 1, where they have several types, and before them the
  // sums.
  float* scratch(int k) { return held + kBlock + k * size; }

  uint64_t size;
  float* held;  // the base
  double* lanes;
  const float** from;
  Buffer* wide;  // the models of a block in binary32

 private:
  std::unique_ptr<float[]> scratch_;
  std::unique_ptr<double[]> lanes_;
  std::unique_ptr<const float*[]> from_;
  std::unique_ptr<Buffer[]> wide_;
};

// G2: 16 lanes as a tree, j with j + 8, 4, 2, 1.
double tree(double* lanes) {
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

struct Loops {
  void (*chunk)(const Buffer*, int, const Buffer&, uint64_t, unsigned, Room&, double*);
  void (*rows_of_columns)(const Buffer*, int, const Buffer&, uint64_t, unsigned, unsigned, uint64_t,
                          Room&, double*);
  void (*combine)(const Buffer*, int, const Buffer&, const float*, uint64_t, bool, uint64_t,
                  unsigned, void*, DType, bool, Room&);
};

// P: as many doubles, kPart, as a register holds. p_widen: of floats in memory.
namespace portable {
#include "cpu/core/vec_portable.h"
using P = double __attribute__((vector_size(16)));
constexpr unsigned kPart = 2;
PYMERGE_INLINE P p_load(const double* p) { return P{p[0], p[1]}; }
PYMERGE_INLINE P p_widen(const float* p) { return P{double(p[0]), double(p[1])}; }
PYMERGE_INLINE void p_store(double* p, P x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE P p_add_product(P x, P y, P z) { return x + y * z; }
#include "cpu/gram/gram_body.h"
}  // namespace portable

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,f16c,popcnt")
namespace avx2 {
#include "cpu/core/vec_avx2.h"
using P = __m256d;
constexpr unsigned kPart = 4;
PYMERGE_INLINE P p_load(const double* p) { return _mm256_loadu_pd(p); }
PYMERGE_INLINE P p_widen(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
PYMERGE_INLINE void p_store(double* p, P x) { _mm256_storeu_pd(p, x); }
PYMERGE_INLINE P p_add_product(P x, P y, P z) { return _mm256_fmadd_pd(y, z, x); }
#include "cpu/gram/gram_body.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,f16c,popcnt,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#include "cpu/core/vec_avx512.h"
using P = __m512d;
constexpr unsigned kPart = 8;
PYMERGE_INLINE P p_load(const double* p) { return _mm512_loadu_pd(p); }
PYMERGE_INLINE P p_widen(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
PYMERGE_INLINE void p_store(double* p, P x) { _mm512_storeu_pd(p, x); }
PYMERGE_INLINE P p_add_product(P x, P y, P z) { return _mm512_fmadd_pd(y, z, x); }
#include "cpu/gram/gram_body.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

const Loops& loops(const std::string& level) {
  const char* name = pick_level(level);
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return avx512::loops;
  if (std::strcmp(name, "avx2") == 0) return avx2::loops;
#endif
  (void)name;
  return portable::loops;
}

// Working precision binary64, in plain loops.

struct Wide {
  const std::vector<Buffer>& models;
  const Buffer& base;

  double delta(size_t k, uint64_t i) const {
    const double x = load<double>(models[k].type, models[k].data, i);
    return base.data == nullptr ? x : x - load<double>(base.type, base.data, i);
  }
  void chunk(uint64_t i, unsigned elements, Room& room, double* sums) const {
    const int count = int(models.size());
    std::fill_n(room.lanes, 16 * pairs_of(count), 0.0);
    std::vector<double> deltas(count);
    for (unsigned e = 0; e < elements; ++e) {
      for (int k = 0; k < count; ++k) deltas[k] = delta(k, i + e);
      double* lane = room.lanes + e % 16;
      for (int a = 0; a < count; ++a) {
        for (int b = a; b < count; ++b, lane += 16) *lane += deltas[a] * deltas[b];
      }
    }
    for (int p = 0; p < pairs_of(count); ++p) sums[p] = tree(room.lanes + 16 * p);
  }
  void row_of_columns(uint64_t i, unsigned elements, double* sums, uint64_t stride) const {
    const int count = int(models.size());
    std::vector<double> deltas(count);
    for (unsigned e = 0; e < elements; ++e) {
      for (int k = 0; k < count; ++k) deltas[k] = delta(k, i + e);
      double* to = sums + e;
      for (int a = 0; a < count; ++a) {
        for (int b = a; b < count; ++b, to += stride) *to += deltas[a] * deltas[b];
      }
    }
  }
};

bool is_wide(const std::vector<Buffer>& models, const Buffer& base) {
  bool wide = base.data != nullptr && base.type == DType::kFloat64;
  for (const Buffer& x : models) wide |= x.type == DType::kFloat64;
  return wide;
}

int threads_of(const GramShape& shape) {
  return shape.rows * shape.columns < kAlone ? 1 : shape.threads;
}

std::vector<Room> rooms_of(int threads, size_t count, uint64_t size = kBlock) {
  std::vector<Room> rooms;
  rooms.reserve(threads);
  for (int t = 0; t < threads; ++t) rooms.emplace_back(int(count), size);
  return rooms;
}

// body(first element, elements, room, row) for every part of at most kChunk elements of every row.
template <typename Combine>
void combine(const GramShape& shape, const std::vector<Buffer>& models, const Combine& body) {
  const int threads = threads_of(shape);
  std::vector<Room> rooms = rooms_of(threads, models.size());
  const uint64_t parts = (shape.columns + kChunk - 1) / kChunk;
  const uint64_t together = std::max<uint64_t>(1, kChunk / std::max<uint64_t>(1, shape.columns));
  const uint64_t groups = parts > 1 ? shape.rows : (shape.rows + together - 1) / together;
  parallel_for(threads, groups * parts, [&](int thread, uint64_t task) {
    const uint64_t begin = parts > 1 ? task / parts : task * together;
    const uint64_t end = parts > 1 ? begin + 1 : std::min(shape.rows, begin + together);
    const uint64_t from = parts > 1 ? task % parts * kChunk : 0;
    const uint64_t to = std::min(shape.columns, from + kChunk);
    for (uint64_t row = begin; row < end; ++row) {
      for (uint64_t c = from; c < to; c += kBlock) {
        body(row, c, unsigned(std::min<uint64_t>(kBlock, to - c)), rooms[thread]);
      }
    }
  });
}

// The coefficients as the working precision has them.
template <typename Work>
std::vector<Work> rounded(const double* from, uint64_t count) {
  std::vector<Work> to(count);
  for (uint64_t i = 0; i < count; ++i) to[i] = Work(from[i]);
  return to;
}

void combine_wide(const Wide& wide, const double* by, uint64_t stride, uint64_t step, uint64_t i,
                  unsigned count, void* out, DType type) {
  for (unsigned e = 0; e < count; ++e) {
    double sum = 0;
    for (size_t k = 0; k < wide.models.size(); ++k) {
      sum += by[k * stride + e * step] * wide.delta(k, i + e);
    }
    const Buffer& base = wide.base;
    store(type, out, i + e, base.data ? load<double>(base.type, base.data, i + e) + sum : sum);
  }
}

}  // namespace

void gram_rows(const GramShape& shape, const std::vector<Buffer>& models, const Buffer& base,
               double* out) {
  const int count = int(models.size()), pairs = pairs_of(count), threads = threads_of(shape);
  const Loops& run = loops(shape.level);
  const bool wide = is_wide(models, base);
  const Wide plain{models, base};
  std::vector<Room> rooms = rooms_of(threads, count);
  const auto chunk = [&](uint64_t i, uint64_t elements, Room& room, double* sums) {
    if (wide) return plain.chunk(i, unsigned(elements), room, sums);
    run.chunk(models.data(), count, base, i, unsigned(elements), room, sums);
  };
  const uint64_t chunks = (shape.columns + kChunk - 1) / kChunk;
  if (chunks > 1) {
    std::vector<double> sums(shape.rows * chunks * pairs);
    parallel_for(threads, shape.rows * chunks, [&](int thread, uint64_t task) {
      const uint64_t at = task % chunks * kChunk;
      chunk(task / chunks * shape.columns + at, std::min(kChunk, shape.columns - at), rooms[thread],
            sums.data() + task * pairs);
    });
    std::fill_n(out, shape.rows * pairs, 0.0);
    for (uint64_t task = 0; task < shape.rows * chunks; ++task) {
      for (int p = 0; p < pairs; ++p) out[task / chunks * pairs + p] += sums[task * pairs + p];
    }
    return;
  }
  const uint64_t together = std::max<uint64_t>(1, kChunk / std::max<uint64_t>(1, shape.columns));
  parallel_for(threads, (shape.rows + together - 1) / together, [&](int thread, uint64_t task) {
    const uint64_t end = std::min(shape.rows, (task + 1) * together);
    for (uint64_t row = task * together; row < end; ++row) {
      chunk(row * shape.columns, shape.columns, rooms[thread], out + row * pairs);
    }
  });
}

void gram_columns(const GramShape& shape, const std::vector<Buffer>& models, const Buffer& base,
                  double* out) {
  const int count = int(models.size()), pairs = pairs_of(count), threads = threads_of(shape);
  const Loops& run = loops(shape.level);
  const bool wide = is_wide(models, base);
  const Wide plain{models, base};
  std::vector<Room> rooms = rooms_of(threads, count, kStrip * kRows);
  const uint64_t blocks = std::max<uint64_t>(1, (shape.rows + kRowBlock - 1) / kRowBlock);
  // Narrower where threads would be without one.
  uint64_t strip = kStrip;
  while (strip > kLeastStrip &&
         blocks * ((shape.columns + strip - 1) / strip) < 2 * uint64_t(threads))
    strip /= 2;
  const uint64_t strips = (shape.columns + strip - 1) / strip;
  // Of each block of rows and strip of columns: [pairs][kStrip], since a strip's last columns are
  // summed as 16.
  std::vector<double> sums(blocks * strips * pairs * kStrip);
  parallel_for(threads, blocks * strips, [&](int thread, uint64_t task) {
    const uint64_t first = task % strips * strip;
    const unsigned elements = unsigned(std::min(strip, shape.columns - first));
    const uint64_t begin = task / strips * kRowBlock;
    const uint64_t end = std::min(shape.rows, begin + kRowBlock);
    double* to = sums.data() + task * pairs * kStrip;
    for (uint64_t row = begin; row < end; row += kRows) {
      const uint64_t i = row * shape.columns + first;
      const unsigned together = unsigned(std::min<uint64_t>(kRows, end - row));
      if (!wide) {
        run.rows_of_columns(models.data(), count, base, i, elements, together, shape.columns,
                            rooms[thread], to);
        continue;
      }
      for (unsigned r = 0; r < together; ++r)
        plain.row_of_columns(i + r * shape.columns, elements, to, kStrip);
    }
  });
  for (uint64_t c = 0; c < shape.columns; ++c) {
    for (int p = 0; p < pairs; ++p) {
      double sum = 0;
      for (uint64_t block = 0; block < blocks; ++block) {
        sum += sums[((block * strips + c / strip) * pairs + p) * kStrip + c % strip];
      }
      out[c * pairs + p] = sum;
    }
  }
}

void combine_rows(const GramShape& shape, const std::vector<Buffer>& models, const Buffer& base,
                  const double* coefficients, void* out, DType out_type) {
  const size_t count = models.size();
  const Loops& run = loops(shape.level);
  const Wide plain{models, base};
  const bool wide = is_wide(models, base) || out_type == DType::kFloat64;
  const std::vector<float> narrow = rounded<float>(coefficients, wide ? 0 : shape.rows * count);
  const bool stream = shape.rows * shape.columns * size_of(out_type) >= kStreamBytes;
  combine(shape, models, [&](uint64_t row, uint64_t c, unsigned elements, Room& room) {
    const uint64_t i = row * shape.columns + c;
    if (wide) {
      combine_wide(plain, coefficients + row * count, 1, 0, i, elements, out, out_type);
    } else {
      run.combine(models.data(), int(count), base, narrow.data() + row * count, 1, false, i,
                  elements, out, out_type, stream, room);
    }
  });
}

void combine_columns(const GramShape& shape, const std::vector<Buffer>& models, const Buffer& base,
                     const double* coefficients, void* out, DType out_type) {
  const size_t count = models.size();
  const Loops& run = loops(shape.level);
  const Wide plain{models, base};
  const bool wide = is_wide(models, base) || out_type == DType::kFloat64;
  const std::vector<float> narrow = rounded<float>(coefficients, wide ? 0 : shape.columns * count);
  const bool stream = shape.rows * shape.columns * size_of(out_type) >= kStreamBytes;
  combine(shape, models, [&](uint64_t row, uint64_t c, unsigned elements, Room& room) {
    const uint64_t i = row * shape.columns + c;
    if (wide) {
      combine_wide(plain, coefficients + c, shape.columns, 1, i, elements, out, out_type);
    } else {
      run.combine(models.data(), int(count), base, narrow.data() + c, shape.columns, true, i,
                  elements, out, out_type, stream, room);
    }
  });
}

}  // namespace pymerge::cpu
