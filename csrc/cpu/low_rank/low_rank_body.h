// Included once per instruction set level by low_rank.cpp, with kBytes, the width of the level's
// registers, kRows and kGroups. Written in the compiler's vectors of that width: of wider ones,
// which it would cut, GCC 12 keeps the sums in memory (5.6 ns an element at rank 16 for 1.0, EPYC
// with AVX2, 2026-11-30). An element's products are added in the order of the rank at every width
// (L2).

template <typename Work>
struct Vector {
  typedef Work type __attribute__((vector_size(kBytes)));
  static constexpr uint64_t lanes = kBytes / sizeof(Work);
};

// `R` rows and `G` vectors of each, so that an element of `right` is loaded once for R rows, and
// one of `left` once for G vectors.
template <typename Work, class T, int R, int G>
[[gnu::always_inline]] inline void block(const Job<Work>& job, uint64_t row, uint64_t column) {
  using V = typename Vector<Work>::type;
  constexpr uint64_t kLanes = Vector<Work>::lanes;
  const Work* left = job.left + row * job.rank;
  const Work* right = job.right + (column - job.first);
  V sum[R][G];
  const auto products = [&](uint64_t k, const auto& take) __attribute__((always_inline)) {
    V factor[G];
    for (int g = 0; g < G; ++g) {
      std::memcpy(&factor[g], right + k * job.stride + uint64_t(g) * kLanes, sizeof(V));
    }
    for (int r = 0; r < R; ++r) {
      const Work by = left[uint64_t(r) * job.rank + k];
      for (int g = 0; g < G; ++g) take(sum[r][g], factor[g] * by);
    }
  };
  products(0, [](V& into, V product) __attribute__((always_inline)) { into = product; });
  for (uint64_t k = 1; k < job.rank; ++k) {
    products(k, [](V& into, V product) __attribute__((always_inline)) { into = into + product; });
  }
  for (int r = 0; r < R; ++r) {
    for (int g = 0; g < G; ++g) {
      const uint64_t at = (row + uint64_t(r)) * job.columns + column + uint64_t(g) * kLanes;
      T stored[kLanes];
      std::memcpy(stored, static_cast<const char*>(job.base) + at * sizeof(T), sizeof(stored));
      Work wide[kLanes];
      for (uint64_t j = 0; j < kLanes; ++j) wide[j] = widen<Work>(stored[j]);
      V weight;
      std::memcpy(&weight, wide, sizeof(V));
      const V total = weight + sum[r][g] * job.scale;
      std::memcpy(job.out + at, &total, sizeof(V));
    }
  }
}

// What is left of a row.
template <typename Work, class T>
[[gnu::always_inline]] inline void element(const Job<Work>& job, uint64_t row, uint64_t column) {
  Work sum = 0;
  for (uint64_t k = 0; k < job.rank; ++k) {
    const Work product =
        job.right[k * job.stride + column - job.first] * job.left[row * job.rank + k];
    sum = k == 0 ? product : sum + product;
  }
  const uint64_t at = row * job.columns + column;
  const Work total = widen<Work>(load_as<T>(job.base, at)) + sum * job.scale;
  std::memcpy(job.out + at, &total, sizeof(Work));
}

// The columns of one panel.
template <typename Work, class T, int R>
[[gnu::always_inline]] inline void rows_of(const Job<Work>& job, uint64_t row) {
  constexpr uint64_t kLanes = Vector<Work>::lanes;
  uint64_t column = job.first;
  for (; column + kGroups * kLanes <= job.end; column += kGroups * kLanes) {
    block<Work, T, R, kGroups>(job, row, column);
  }
  for (; column + kLanes <= job.end; column += kLanes) block<Work, T, R, 1>(job, row, column);
  for (; column < job.end; ++column) {
    for (int r = 0; r < R; ++r) element<Work, T>(job, row + uint64_t(r), column);
  }
}

template <typename Work, class T>
void run(const Job<Work>& job) {
  uint64_t row = 0;
  for (; row + kRows <= job.rows; row += kRows) rows_of<Work, T, kRows>(job, row);
  for (; row < job.rows; ++row) rows_of<Work, T, 1>(job, row);
}

template <typename Work>
void run(DType type, const Job<Work>& job) {
  switch (type) {
    case DType::kFloat16:
      return run<Work, Half>(job);
    case DType::kBFloat16:
      return run<Work, BFloat16>(job);
    case DType::kFloat64:
      return run<Work, double>(job);
    case DType::kFloat32:
      return run<Work, float>(job);
  }
}
