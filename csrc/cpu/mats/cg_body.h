// Loops over at most kChunk elements, included once per instruction set level by cg.cpp. They are
// written in the compiler's vectors of kLanes elements, which it cuts to the level's width (left to
// itself it vectorises none of them); a lane's sum is the same at every width.

using Floats [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using Doubles [[gnu::vector_size(kLanes * sizeof(double))]] = double;

template <typename T>
using Lanes = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;

// The first `count` of kLanes elements; the rest are 0.
template <typename T>
[[gnu::always_inline]] inline void load(Lanes<T>& lanes, const T* from, uint64_t count) {
  if (count < kLanes) lanes = Lanes<T>{};
  std::memcpy(&lanes, from, count < kLanes ? count * sizeof(T) : sizeof(lanes));
}

template <typename T>
[[gnu::always_inline]] inline void store(T* to, const Lanes<T>& lanes, uint64_t count) {
  std::memcpy(to, &lanes, count < kLanes ? count * sizeof(T) : sizeof(lanes));
}

template <typename T>
[[gnu::always_inline]] inline void add_product(Doubles& sum, const Lanes<T>& x, const Lanes<T>& y) {
  if constexpr (std::is_same_v<T, float>) {
    sum += __builtin_convertvector(x, Doubles) * __builtin_convertvector(y, Doubles);
  } else {
    sum += x * y;
  }
}

[[gnu::always_inline]] inline double total(const Doubles& lanes) {
  double held[kLanes];
  std::memcpy(held, &lanes, sizeof(held));
  for (uint64_t width = kLanes / 2; width > 0; width /= 2) {
    for (uint64_t j = 0; j < width; ++j) held[j] += held[j + width];
  }
  return held[0];
}

// one(i, count) for whole groups of lanes, with a constant count, and for what is left.
template <typename One>
[[gnu::always_inline]] inline void groups(uint64_t n, const One& one) {
  uint64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) one(i, kLanes);
  if (i < n) one(i, n - i);
}

template <typename T>
double dot(const T* x, const T* y, uint64_t n) {
  Doubles sum = {};
  groups(n, [&](uint64_t i, uint64_t count) __attribute__((always_inline)) {
    Lanes<T> a, b;
    load<T>(a, x + i, count);
    load<T>(b, y + i, count);
    add_product<T>(sum, a, b);
  });
  return total(sum);
}

template <typename T>
Pair advance(T* step, T* r, const T* p, const T* q, T alpha, uint64_t n) {
  Doubles rr = {}, dd = {};
  groups(n, [&](uint64_t i, uint64_t count) __attribute__((always_inline)) {
    Lanes<T> moved, left, along, image;
    load<T>(moved, step + i, count);
    load<T>(left, r + i, count);
    load<T>(along, p + i, count);
    load<T>(image, q + i, count);
    moved += alpha * along;
    left -= alpha * image;
    store<T>(step + i, moved, count);
    store<T>(r + i, left, count);
    add_product<T>(rr, left, left);
    add_product<T>(dd, moved, moved);
  });
  return {total(rr), total(dd)};
}

template <typename T>
Pair turn(T* p, const T* z, const T* step, T beta, uint64_t n) {
  Doubles pp = {}, dp = {};
  groups(n, [&](uint64_t i, uint64_t count) __attribute__((always_inline)) {
    Lanes<T> next, before, at;
    load<T>(next, z + i, count);
    load<T>(at, step + i, count);
    if (beta != 0) {  // p may hold NaN where it is 0
      load<T>(before, p + i, count);
      next += beta * before;
    }
    store<T>(p + i, next, count);
    add_product<T>(pp, next, next);
    add_product<T>(dp, at, next);
  });
  return {total(pp), total(dp)};
}

template <typename T>
const Loops<T>& loops() {
  static const Loops<T> table{&dot<T>, &advance<T>, &turn<T>};
  return table;
}
