#include "cpu/core/finite.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/core/levels.h"
#include "cpu/core/threads.h"

namespace pymerge::cpu {

namespace {

constexpr uint64_t kRun = 1024;        // elements at a time; a 16-bit counter does not overflow
constexpr uint64_t kAhead = 16384;     // bytes that are fetched ahead
constexpr uint64_t kTask = 256 << 10;  // bytes
constexpr uint64_t kAlone = 1 << 20;   // bytes: below, waking the workers costs more than they save

namespace portable {
#include "cpu/core/finite_body.h"
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "cpu/core/finite_body.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl")
namespace avx512 {
#include "cpu/core/finite_body.h"
}
#pragma GCC pop_options
#endif

using Count = uint64_t (*)(DType, const unsigned char*, uint64_t);

Count loop(const std::string& level) {
  const char* name = pick_level(level);
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return avx512::count_of;
  if (std::strcmp(name, "avx2") == 0) return avx2::count_of;
#endif
  (void)name;
  return portable::count_of;
}

}  // namespace

uint64_t count_non_finite(const void* data, DType type, uint64_t n, int threads,
                          const std::string& level) {
  const Count run = loop(level);
  const auto* bytes = static_cast<const unsigned char*>(data);
  const uint64_t size = size_of(type), step = kTask / size;
  if (n * size < kAlone) threads = 1;
  std::atomic<uint64_t> total{0};
  parallel_for(threads, (n + step - 1) / step, [&](int, uint64_t task) {
    const uint64_t at = task * step;
    total.fetch_add(run(type, bytes + at * size, std::min(step, n - at)),
                    std::memory_order_relaxed);
  });
  return total;
}

}  // namespace pymerge::cpu
