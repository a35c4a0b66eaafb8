// Runs the CPU kernels on inputs that sit in allocations of exactly their size, at every level, and
// compares the levels' outputs. Built with -fsanitize=address,undefined by tests/sanitize.sh;
// prints the number of merges and a digest of their outputs, which is the same on every processor
// (tests/backends/test_processors.py).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/core/finite.h"
#include "cpu/core/levels.h"
#include "cpu/ties/ties.h"

namespace {

using namespace pymerge;       // NOLINT
using namespace pymerge::cpu;  // NOLINT

struct Tensor {
  Tensor(uint64_t n, DType type, unsigned shift)
      : n(n), type(type), shift(shift), data(new char[n * size_of(type) + shift]) {}
  void* at() const { return data.get() + shift; }
  Buffer buffer() const { return {at(), type}; }
  uint64_t n;
  DType type;
  unsigned shift;
  std::unique_ptr<char[]> data;
};

std::mt19937_64 random_bits(20);

uint64_t below(uint64_t bound) { return random_bits() % bound; }

void fill(const Tensor& tensor, int kind) {
  for (uint64_t i = 0; i < tensor.n; ++i) {
    // Like a normal distribution, but of exact operations alone: log differs between processors.
    const uint64_t bits = random_bits();
    float x = 0;
    for (int part = 0; part < 64; part += 16) x += float(int(bits >> part & 0xffff) - 32768);
    x *= 0x1p-21f;
    if (kind == 1) x = float(int(below(9)) - 4) * 0.125f;
    if (kind == 2) x *= 1e-38f;
    if (kind == 3 && below(200) == 0) x = below(2) ? NAN : below(2) ? INFINITY : -INFINITY;
    if (kind == 4) x = below(100) == 0 ? x : 0;
    if (kind == 5) x *= float(i / 4096 % 7);
    store<double>(tensor.type, tensor.at(), i, double(x));
  }
}

uint64_t digest = 14695981039346656037u;

void add(uint64_t word) { digest = (digest ^ word) * 1099511628211u; }

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool one_merge() {
  static const uint64_t sizes[] = {0, 1, 15, 33, 64, 1000, 2047, 2049, 4100, 20000, 130001, 300001};
  // Where thresholds are found while merging, in one stage or two: whole tasks, and last blocks of
  // almost every length.
  static const uint64_t large[] = {65536,  65536 + 4063,  262144,     262144 + 2024,
                                   300001, 393216 + 1999, 524288 - 33};
  const bool one_pass = below(3) == 0;
  const uint64_t n = one_pass ? large[below(7)] : sizes[below(12)];
  int count = int(below(n > 5000 ? 5 : 10)) + 1;
  if (below(12) == 0 && n < 5000) count = 66;
  const bool mixed = below(3) == 0;
  const DType common = DType(below(!one_pass && below(6) == 0 ? 4 : 3));
  const auto type = [&] { return mixed ? DType(below(3)) : common; };
  const int kind = int(below(6));
  std::vector<Tensor> tensors;
  for (int k = 0; k <= count; ++k) {
    const DType its = type();  // before the shift, in this order on every processor
    tensors.emplace_back(n, its, unsigned(below(2) ? 0 : below(8)));
  }
  for (const Tensor& tensor : tensors) fill(tensor, kind);
  std::vector<Buffer> models;
  for (int k = 0; k < count; ++k) models.push_back(tensors[size_t(k)].buffer());
  Buffer base = tensors.back().buffer();
  if (below(4) == 0) base = Buffer();
  TiesRule rule{};
  rule.trim = Trim(one_pass || below(2) ? 0 : below(4));
  rule.elect = Elect(below(2) ? 0 : below(3));
  rule.merge = Merge(below(2) ? 0 : below(4));
  rule.zero_majority = below(2);
  rule.rescale = TiesRule::Norm(one_pass || below(2) ? 0 : below(5));
  rule.scaling = below(2) ? 1.0 : -0.7;
  rule.key = random_bits();
  const bool plain = below(2);
  const uint64_t election = below(2);
  for (int k = 0; k < count; ++k) {
    const double density = below(8) == 0 ? 0.001 : double(below(11)) / 10;
    rule.densities.push_back(density);
    rule.ranks.push_back(uint64_t(density * double(n)));
    rule.dropped.push_back(rule.trim == Trim::kOutliers ? rule.ranks.back() / 3 : 0);
    rule.weights.push_back(plain ? 1.0 : double(below(5)) / 2 - 0.5);
    rule.elect_weights.push_back(plain || election == 0 ? 1.0 : rule.weights.back());
  }
  const unsigned shift = unsigned(below(2) ? 0 : below(8));
  const DType out_type = type();
  std::vector<double> first;
  TiesStats first_stats;
  std::mt19937_64 threads{random_bits()};  // however many levels there are
  for (const auto& [name, usable] : levels()) {
    if (!usable) continue;
    const Tensor out(n, out_type, shift);
    Scratch scratch;
    const Context context{kernels(name), threads() % 16 == 0 ? 200 : int(threads() % 3) + 1,
                          scratch};
    const TiesStats stats = ties(context, models, base, out.at(), out_type, n, rule);
    std::vector<double> values;
    for (uint64_t i = 0; i < n; ++i) values.push_back(load<double>(out_type, out.at(), i));
    uint64_t not_finite = 0;
    for (double value : values) not_finite += !std::isfinite(value);
    if (count_non_finite(out.at(), out_type, n, context.threads, name) != not_finite) {
      std::fprintf(stderr, "level %s counts non-finite elements wrongly\n", name.c_str());
      return false;
    }
    if (first_stats.kept.empty()) {
      first = values;
      first_stats = stats;
      for (double value : values) {
        uint64_t word = 0;
        if (!std::isnan(value)) std::memcpy(&word, &value, sizeof word);
        add(word);
      }
      for (uint64_t kept : stats.kept) add(kept);
      add(stats.conflicts);
      continue;
    }
    bool equal = stats.kept == first_stats.kept && stats.conflicts == first_stats.conflicts &&
                 stats.positive == first_stats.positive && stats.negative == first_stats.negative &&
                 stats.non_finite == first_stats.non_finite;
    for (uint64_t i = 0; i < n; ++i) equal &= same(values[i], first[i]);
    if (!equal) {
      std::fprintf(stderr, "level %s differs: n=%llu count=%d\n", name.c_str(),
                   static_cast<unsigned long long>(n), count);
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int merges = argc > 1 ? std::stoi(argv[1]) : 300;
  if (argc > 2) random_bits.seed(std::stoull(argv[2]));
  for (int merge = 0; merge < merges; ++merge) {
    if (!one_merge()) return 1;
  }
  std::printf("%d merges at every level, clean, digest %016llx\n", merges,
              static_cast<unsigned long long>(digest));
  return 0;
}
