// The vector shim in plain C++ with GCC's and Clang's vector extensions: 16 lanes in four 128-bit
// vectors, which are SSE2 registers on x86-64 and NEON registers on aarch64. See vec_avx512.h for
// what is what.

#define PYMERGE_INLINE static inline __attribute__((always_inline))

typedef float V4F __attribute__((vector_size(16)));
typedef uint32_t V4U __attribute__((vector_size(16)));
typedef int32_t V4I __attribute__((vector_size(16)));

struct F {
  V4F v[4];
};
struct U {
  V4U v[4];
};
struct M {
  V4I v[4];
};
constexpr int kVectors = 2;
constexpr int kHeldVectors = kVectors;
constexpr int kHeldModels = 0;
constexpr int kPhiloxBlocks = 1;  // of 16 counters, at a time
constexpr unsigned kAhead = 2048;
constexpr int kAheadCache = 2;

#define PYMERGE_LANES for (int j = 0; j < 4; ++j)

PYMERGE_INLINE F f_load(const void* p) {
  F r;
  memcpy(&r, p, sizeof(r));
  return r;
}
PYMERGE_INLINE void f_store(void* p, F x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE void f_stream(void* p, F x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE F f_set(float x) {
  F r;
  PYMERGE_LANES r.v[j] = V4F{x, x, x, x};
  return r;
}
PYMERGE_INLINE U u_set(uint32_t x) {
  U r;
  PYMERGE_LANES r.v[j] = V4U{x, x, x, x};
  return r;
}
PYMERGE_INLINE U f_bits(F x) { return bit_cast<U>(x); }
PYMERGE_INLINE F u_float(U x) { return bit_cast<F>(x); }

#define PYMERGE_BINARY(type, result, name, op) \
  PYMERGE_INLINE result name(type x, type y) { \
    result r;                                  \
    PYMERGE_LANES r.v[j] = x.v[j] op y.v[j];   \
    return r;                                  \
  }
PYMERGE_BINARY(F, F, f_add, +)
PYMERGE_BINARY(F, F, f_sub, -)
PYMERGE_BINARY(F, F, f_mul, *)
PYMERGE_BINARY(F, F, f_div, /)
PYMERGE_BINARY(U, U, u_add, +)
PYMERGE_BINARY(U, U, u_sub, -)
PYMERGE_BINARY(U, U, u_and, &)
PYMERGE_BINARY(M, M, m_and, &)
PYMERGE_BINARY(M, M, m_or, |)
PYMERGE_BINARY(F, M, f_ge, >=)
PYMERGE_BINARY(F, M, f_gt, >)
PYMERGE_BINARY(F, M, f_lt, <)
PYMERGE_BINARY(F, M, f_le, <=)
PYMERGE_BINARY(F, M, f_eq, ==)
PYMERGE_BINARY(U, M, u_ge, >=)
PYMERGE_BINARY(U, M, u_lt, <)
#undef PYMERGE_BINARY
PYMERGE_INLINE M f_nlt(F x, F y) {
  M r = f_lt(x, y);
  PYMERGE_LANES r.v[j] = ~r.v[j];
  return r;
}
PYMERGE_INLINE M f_gt_in(M m, F a, F b) { return m_and(m, f_gt(a, b)); }
PYMERGE_INLINE F f_and(F x, F y) { return u_float(u_and(f_bits(x), f_bits(y))); }
PYMERGE_INLINE F f_xor(F x, F y) {
  U r;
  const U a = f_bits(x), b = f_bits(y);
  PYMERGE_LANES r.v[j] = a.v[j] ^ b.v[j];
  return u_float(r);
}
PYMERGE_INLINE F f_abs(F x) { return u_float(u_and(f_bits(x), u_set(0x7fffffffu))); }
PYMERGE_INLINE F f_select(M m, F yes, F no) {
  const U bits = bit_cast<U>(m), a = f_bits(yes), b = f_bits(no);
  U r;
  PYMERGE_LANES r.v[j] = (bits.v[j] & a.v[j]) | (~bits.v[j] & b.v[j]);
  return u_float(r);
}
PYMERGE_INLINE F f_max(F x, F y) { return f_select(f_gt(x, y), x, y); }
PYMERGE_INLINE F f_min(F x, F y) { return f_select(f_lt(x, y), x, y); }
PYMERGE_INLINE F f_keep(M m, F x) { return u_float(u_and(bit_cast<U>(m), f_bits(x))); }
PYMERGE_INLINE F f_add_kept(M m, F x, F y) { return f_add(x, f_keep(m, y)); }
PYMERGE_INLINE F f_add_product(F x, F y, F z) { return f_add(x, f_mul(y, z)); }
PYMERGE_INLINE F u_to_float(U x) {
  F r;
  PYMERGE_LANES r.v[j] = __builtin_convertvector(bit_cast<M>(x).v[j], V4F);
  return r;
}
PYMERGE_INLINE U u_add_one(M m, U x) { return u_sub(x, bit_cast<U>(m)); }
PYMERGE_INLINE F f_divide_by_count(F total, U ones) {
  return f_div(total, f_max(u_to_float(ones), f_set(1.0f)));
}

PYMERGE_INLINE U u_load(const void* p) {
  U r;
  memcpy(&r, p, sizeof(r));
  return r;
}
PYMERGE_INLINE void u_store(void* p, U x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE void u_stream(void* p, U x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE M u_fewer(U x, U y) { return u_lt(x, y); }  // of counts below 2^31
PYMERGE_INLINE U u_keep(M m, U x) { return u_and(bit_cast<U>(m), x); }
PYMERGE_INLINE unsigned m_bits(M m) {
  unsigned bits = 0;
  PYMERGE_LANES {
    const V4I weighted = m.v[j] & V4I{1, 2, 4, 8};
    bits |= unsigned(weighted[0] | weighted[1] | weighted[2] | weighted[3]) << (4 * j);
  }
  return bits;
}
PYMERGE_INLINE M m_from(unsigned bits) {
  M r;
  PYMERGE_LANES {
    const int32_t four = int32_t(bits >> (4 * j) & 15);
    r.v[j] = (V4I{four, four, four, four} & V4I{1, 2, 4, 8}) != V4I{0, 0, 0, 0};
  }
  return r;
}
PYMERGE_INLINE void m_store(uint16_t* p, M m) {
  const uint16_t bits = uint16_t(m_bits(m));
  memcpy(p, &bits, 2);
}
PYMERGE_INLINE unsigned u_compress(uint32_t* p, M m, U x) {
  uint32_t lanes[16];
  u_store(lanes, x);
  unsigned count = 0;
  for (unsigned bits = m_bits(m); bits != 0; bits &= bits - 1)
    p[count++] = lanes[__builtin_ctz(bits)];
  return count;
}

PYMERGE_INLINE U u_max(U x, U y) {
  return bit_cast<U>(f_select(u_ge(x, y), u_float(x), u_float(y)));
}

typedef double V2D __attribute__((vector_size(16)));
struct D {
  V2D v[8];
};
PYMERGE_INLINE D d_load(const double* p) {
  D r;
  memcpy(&r, p, sizeof(r));
  return r;
}
PYMERGE_INLINE void d_store(double* p, D x) { memcpy(p, &x, sizeof(x)); }
PYMERGE_INLINE D d_add(D x, F y) {
  for (int j = 0; j < 8; ++j)
    x.v[j] += V2D{double(y.v[j / 2][j % 2 * 2]), double(y.v[j / 2][j % 2 * 2 + 1])};
  return x;
}
PYMERGE_INLINE D d_from(F x) {
  D r;
  for (int j = 0; j < 8; ++j) {
    r.v[j] = V2D{double(x.v[j / 2][j % 2 * 2]), double(x.v[j / 2][j % 2 * 2 + 1])};
  }
  return r;
}
PYMERGE_INLINE D d_add_product(D x, D y, D z) {
  for (int j = 0; j < 8; ++j) x.v[j] += y.v[j] * z.v[j];
  return x;
}
PYMERGE_INLINE D d_add_square(D x, F y) {
  for (int j = 0; j < 8; ++j) {
    const V2D wide = {double(y.v[j / 2][j % 2 * 2]), double(y.v[j / 2][j % 2 * 2 + 1])};
    x.v[j] += wide * wide;
  }
  return x;
}
// The same in the flagged lanes.
PYMERGE_INLINE D d_add_kept(M m, D x, F y) { return d_add(x, f_keep(m, y)); }
PYMERGE_INLINE D d_add_square_kept(M m, D x, F y) { return d_add_square(x, f_keep(m, y)); }

PYMERGE_INLINE U u_lanes(uint32_t step) {
  uint32_t lanes[16];
  for (uint32_t j = 0; j < 16; ++j) lanes[j] = j * step;
  return u_load(lanes);
}

struct W {
  U low, high;
};
PYMERGE_INLINE W w_set(uint32_t x) { return {u_set(x), u_set(0)}; }
PYMERGE_INLINE W w_count(uint32_t x) { return {u_add(u_set(x), u_lanes(1)), u_set(0)}; }
PYMERGE_INLINE W w_multiply(W x, uint32_t by) {
  uint32_t lanes[16], highs[16], lows[16];
  u_store(lanes, x.low);
  for (int j = 0; j < 16; ++j) {
    const uint64_t product = uint64_t(by) * lanes[j];
    highs[j] = uint32_t(product >> 32);
    lows[j] = uint32_t(product);
  }
  return {u_load(lows), u_load(highs)};
}
PYMERGE_INLINE W w_high(W x) { return {x.high, x.high}; }
PYMERGE_INLINE W w_xor(W x, W y, uint32_t z) {
  PYMERGE_LANES x.low.v[j] ^= y.low.v[j] ^ V4U { z, z, z, z };
  return x;
}
PYMERGE_INLINE void w_interleave(uint32_t* dst, W x0, W x1, W x2, W x3) {
  const W words[4] = {x0, x1, x2, x3};
  for (int j = 0; j < 4; ++j) {
    uint32_t lanes[16];
    u_store(lanes, words[j].low);
    for (int i = 0; i < 16; ++i) dst[4 * i + j] = lanes[i];
  }
}
PYMERGE_INLINE uint64_t w_below(W x0, W x1, W x2, W x3, uint32_t bound) {
  const auto spread = [bound](U words) {  // bit i to bit 4 i
    uint64_t x = m_bits(u_lt(words, u_set(bound)));
    x = (x | x << 24) & 0x000000ff000000ffu;
    x = (x | x << 12) & 0x000f000f000f000fu;
    x = (x | x << 6) & 0x0303030303030303u;
    return (x | x << 3) & 0x1111111111111111u;
  };
  return spread(x0.low) | spread(x1.low) << 1 | spread(x2.low) << 2 | spread(x3.low) << 3;
}

PYMERGE_INLINE F f_load_bf16(const void* p) {
  uint16_t raw[16];
  memcpy(raw, p, sizeof(raw));
  uint32_t wide[16];
  for (int j = 0; j < 16; ++j) wide[j] = uint32_t(raw[j]) << 16;
  return f_load(wide);
}
PYMERGE_INLINE void f_store_bf16(void* p, F x) {
  float lanes[16];
  f_store(lanes, x);
  uint16_t raw[16];
  for (int j = 0; j < 16; ++j) raw[j] = to_bfloat16(lanes[j]).bits;
  memcpy(p, raw, sizeof(raw));
}
PYMERGE_INLINE F f_load_half(const void* p) {
  uint16_t raw[16];
  memcpy(raw, p, sizeof(raw));
  float lanes[16];
  for (int j = 0; j < 16; ++j) lanes[j] = to_float(Half{raw[j]});
  return f_load(lanes);
}
PYMERGE_INLINE void f_store_half(void* p, F x) {
  float lanes[16];
  f_store(lanes, x);
  uint16_t raw[16];
  for (int j = 0; j < 16; ++j) raw[j] = to_half(lanes[j]).bits;
  memcpy(p, raw, sizeof(raw));
}

// Elements 0, 2, ... and 1, 3, ... of 32, on machines of either byte order.
PYMERGE_INLINE F f_load_stride2(const void* p, int first) {
  uint16_t raw[32];
  memcpy(raw, p, sizeof(raw));
  uint32_t wide[16];
  for (int j = 0; j < 16; ++j) wide[j] = uint32_t(raw[2 * j + first]) << 16;
  return f_load(wide);
}
PYMERGE_INLINE F f_load_even(const void* p) { return f_load_stride2(p, 0); }
PYMERGE_INLINE F f_load_odd(const void* p) { return f_load_stride2(p, 1); }
PYMERGE_INLINE void f_store_pairs(void* p, F even, F odd) {
  uint16_t raw[32], half[16];
  f_store_bf16(half, even);
  for (int j = 0; j < 16; ++j) raw[2 * j] = half[j];
  f_store_bf16(half, odd);
  for (int j = 0; j < 16; ++j) raw[2 * j + 1] = half[j];
  memcpy(p, raw, sizeof(raw));
}
PYMERGE_INLINE void f_stream_pairs(void* p, F even, F odd) { f_store_pairs(p, even, odd); }
