// P2, divergences: included once per instruction set by masked.cpp, behind masked_body.h. Sweeps
// over whole rows without branches. The arithmetic is the spec's: every operation is rounded, and a
// fused multiply-add once, which is a call of the C library where the level has no instruction for
// it.

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// exp of x <= 0.
inline float exponential(float x) {
  const float held = pick(x < -104.0f, -104.0f, x);
  const float near = held * 1.44269504088896340736f + 12582912.0f;  // to the nearest integer
  const float whole = near - 12582912.0f;
  float s = fused(whole, -0.693145751953125f, held);
  s = fused(whole, -1.428606765330187045e-06f, s);
  float u = 0.000198527617612853646278381f;
  u = fused(u, s, 0.00139304355252534151077271f);
  u = fused(u, s, 0.00833336077630519866943359f);
  u = fused(u, s, 0.0416664853692054748535156f);
  u = fused(u, s, 0.166666671633720397949219f);
  u = fused(u, s, 0.5f);
  u = 1.0f + fused(s * s, u, s);
  const int32_t power = int32_t(float_bits(near) - float_bits(12582912.0f)), half = power >> 1;
  const float scaled = u * bits_float(uint32_t(half + 127) << 23);
  return keep(!(x < -104.0f), scaled * bits_float(uint32_t(power - half + 127) << 23));
}

inline double exponential(double x) {
  constexpr double kNearest = 6755399441055744.0;
  const double held = pick(x < -708.0, -708.0, x);
  const double near = held * 1.4426950408889634 + kNearest;
  const double whole = near - kNearest;
  const double s = (held - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10;
  double u = 1.0 / 6227020800.0;
  u = u * s + 1.0 / 479001600.0;
  u = u * s + 1.0 / 39916800.0;
  u = u * s + 1.0 / 3628800.0;
  u = u * s + 1.0 / 362880.0;
  u = u * s + 1.0 / 40320.0;
  u = u * s + 1.0 / 5040.0;
  u = u * s + 1.0 / 720.0;
  u = u * s + 1.0 / 120.0;
  u = u * s + 1.0 / 24.0;
  u = u * s + 1.0 / 6.0;
  u = u * s + 0.5;
  u = u * s + 1.0;
  u = u * s + 1.0;
  const uint64_t power = bit_cast<uint64_t>(near) - bit_cast<uint64_t>(kNearest);
  return keep(!(x < -708.0), u * bit_cast<double>((power + 1023) << 52));
}

// log of a normal number, by the series of the inverse hyperbolic tangent: exact near 1, where
// terms of divergences are.
inline double logarithm(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  const double above = bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  const bool large = above > 1.4142135623730951;
  const double m = pick(large, above * 0.5, above);
  const double biased = bit_cast<double>(0x4330000000000000ull | bits >> 52) - 4503599627370496.0;
  const double exponent = (biased - 1023.0) + keep(large, 1.0);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double u = 1.0 / 21.0;
  u = u * z + 1.0 / 19.0;
  u = u * z + 1.0 / 17.0;
  u = u * z + 1.0 / 15.0;
  u = u * z + 1.0 / 13.0;
  u = u * z + 1.0 / 11.0;
  u = u * z + 1.0 / 9.0;
  u = u * z + 1.0 / 7.0;
  u = u * z + 1.0 / 5.0;
  u = u * z + 1.0 / 3.0;
  u = u * z + 1.0;
  return exponent * 0.6931471805599453 + (s + s) * u;
}

constexpr uint64_t kSum = 16;  // lanes of the sums

// P2, R: whole vectors in order, then lanes in halves.
template <class T>
T total_of(const T* x, uint64_t n) {
  if (n < kSum) {
    T sum = x[0];
    for (uint64_t j = 1; j < n; ++j) sum += x[j];
    return sum;
  }
  T lanes[kSum];
  std::copy(x, x + kSum, lanes);
  uint64_t j = kSum;
  for (; j + kSum <= n; j += kSum) {
    for (uint64_t l = 0; l < kSum; ++l) lanes[l] += x[j + l];
  }
  for (uint64_t l = 0; j < n; ++j, ++l) lanes[l] += x[j];
  for (uint64_t half = kSum / 2; half > 0; half /= 2) {
    for (uint64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// P2, S, over vectors of kWidth elements: four sums in turn, of which full ones move up a level.
template <class T, uint64_t kWidth>
T cascade(const T* x, uint64_t n) {
  const uint64_t vectors = n / kWidth, turns = vectors / 4;
  uint64_t levels = 1;  // the logarithm of `turns`, rounded up
  while (uint64_t(1) << levels < turns) ++levels;
  const uint64_t power = std::max<uint64_t>(4, levels / 4), step = uint64_t(1) << power;
  T sums[4][4 * kWidth] = {};
  const auto add = [&](uint64_t turn) {
    const T* from = x + turn * 4 * kWidth;
    for (uint64_t l = 0; l < 4 * kWidth; ++l) sums[0][l] += from[l];
  };
  uint64_t turn = 0;
  while (turn + step <= turns) {
    for (uint64_t j = 0; j < step; ++j) add(turn++);
    for (uint64_t level = 1; level < 4; ++level) {
      for (uint64_t l = 0; l < 4 * kWidth; ++l) {
        sums[level][l] += sums[level - 1][l];
        sums[level - 1][l] = 0;
      }
      if ((turn & (step - 1) << (level * power)) != 0) break;
    }
  }
  while (turn < turns) add(turn++);
  for (uint64_t level = 1; level < 4; ++level) {
    for (uint64_t l = 0; l < 4 * kWidth; ++l) sums[0][l] += sums[level][l];
  }
  for (uint64_t v = 4 * turns; v < vectors; ++v) {
    for (uint64_t l = 0; l < kWidth; ++l) sums[0][l] += x[v * kWidth + l];
  }
  for (uint64_t k = 1; k < 4; ++k) {
    for (uint64_t l = 0; l < kWidth; ++l) sums[0][l] += sums[0][k * kWidth + l];
  }
  if (kWidth == 1) return sums[0][0];
  T total = 0;
  for (uint64_t j = vectors * kWidth; j < n; ++j) total += x[j];
  for (uint64_t l = 0; l < kWidth; ++l) total += sums[0][l];
  return total;
}

// exp(x - max x) in place; returns their sum.
template <class T>
T exponentials(T* x, uint64_t n) {
  T largest[kSum], most = x[0];
  std::fill(largest, largest + kSum, most);
  uint64_t at = 0;
  for (; at + kSum <= n; at += kSum) {
    for (uint64_t l = 0; l < kSum; ++l)
      largest[l] = pick(x[at + l] > largest[l], x[at + l], largest[l]);
  }
  for (; at < n; ++at) most = pick(x[at] > most, x[at], most);
  for (uint64_t l = 0; l < kSum; ++l) most = pick(largest[l] > most, largest[l], most);
  for (uint64_t j = 0; j < n; ++j) x[j] = exponential(x[j] - most);
  return total_of(x, n);
}

template <class T>
T divergence(const MaskedInputs& in, uint64_t first, uint64_t n, std::vector<T>& model,
             std::vector<T>& base) {
  model.resize(n);
  base.resize(n);
  for (uint64_t j = 0; j < n; j += kBlock) {
    const uint64_t count = std::min<uint64_t>(kBlock, n - j);
    widen_block(in.models[0], first + j, count, model.data() + j);
    widen_block(in.base, first + j, count, base.data() + j);
  }
  T *p = model.data(), *q = base.data();
  const T p_by = 1 / exponentials(p, n), q_by = 1 / exponentials(q, n);
  for (uint64_t j = 0; j < n; ++j) {
    const T share = p[j] * p_by + T(1e-8), other = q[j] * q_by + T(1e-8);
    p[j] = share * T(logarithm(double(share / other)));
  }
  const T found = n < kSum ? cascade<T, 1>(p, n) : cascade<T, kSum>(p, n);
  return is_finite(found) ? found : T(0);
}

// Of rows begin .. end - 1. T: what they are computed in.
template <class Work, class T>
void divergences(const MaskedInputs& in, uint64_t row, uint64_t begin, uint64_t end, Work* out) {
  std::vector<T> model, base;
  for (uint64_t r = begin; r < end; ++r)
    out[r] = Work(divergence<T>(in, r * row, row, model, base));
}

template <class Work>
const Loops<Work>& loops() {
  static const Loops<Work> table{
      &keys_of<Work>,  &nonzero<Work>,           &energies<Work>,
      &overlaps<Work>, &divergences<Work, Work>, &divergences<Work, double>,
      &merge<Work>};
  return table;
}
