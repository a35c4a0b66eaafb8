// The vector shim for AVX2 with F16C: 16 lanes in two registers, masks as vectors. See vec_avx512.h
// for what is what.

#define PYMERGE_INLINE static inline __attribute__((always_inline))

struct F {
  __m256 a, b;
};
struct U {
  __m256i a, b;
};
struct M {
  __m256 a, b;
};
constexpr int kVectors = 2;
// Where models stay in registers and on the stack, fp32 is taken 16 elements at a time. A core of a
// Zen 3 server, 2026-11-30, known thresholds, tensors in the third-level cache, ns for 16 elements,
// against a loop over models with their values in memory: fp32 K = 2, 4: 12.3, 21.6 against 25.9,
// 35.4; bf16 14.9, 24.7 against 19.3, 26.2. The same for K = 8 gained nothing.
constexpr int kHeldVectors = 1;
constexpr int kHeldModels = 4;
constexpr int kPhiloxBlocks = 1;  // of 16 counters, at a time
// As in vec_avx512.h. There, fp32 K = 2, 4: 12.3, 21.6 so, 17.8, 22.3 with 2 KB in the second
// level.
constexpr unsigned kAhead = 1024;
constexpr int kAheadCache = 3;

PYMERGE_INLINE F f_load(const void* p) {
  const float* q = static_cast<const float*>(p);
  return {_mm256_loadu_ps(q), _mm256_loadu_ps(q + 8)};
}
PYMERGE_INLINE void f_store(void* p, F x) {
  float* q = static_cast<float*>(p);
  _mm256_storeu_ps(q, x.a);
  _mm256_storeu_ps(q + 8, x.b);
}
PYMERGE_INLINE void f_stream(void* p, F x) {
  float* q = static_cast<float*>(p);
  _mm256_stream_ps(q, x.a);
  _mm256_stream_ps(q + 8, x.b);
}
PYMERGE_INLINE F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

#define PYMERGE_BINARY(type, result, name, op) \
  PYMERGE_INLINE result name(type x, type y) { return {op(x.a, y.a), op(x.b, y.b)}; }
PYMERGE_BINARY(F, F, f_add, _mm256_add_ps)
PYMERGE_BINARY(F, F, f_sub, _mm256_sub_ps)
PYMERGE_BINARY(F, F, f_mul, _mm256_mul_ps)
PYMERGE_BINARY(F, F, f_div, _mm256_div_ps)
PYMERGE_BINARY(F, F, f_max, _mm256_max_ps)
PYMERGE_BINARY(F, F, f_min, _mm256_min_ps)
PYMERGE_BINARY(F, F, f_and, _mm256_and_ps)
PYMERGE_BINARY(F, F, f_xor, _mm256_xor_ps)
PYMERGE_BINARY(U, U, u_add, _mm256_add_epi32)
PYMERGE_BINARY(U, U, u_sub, _mm256_sub_epi32)
PYMERGE_BINARY(U, U, u_and, _mm256_and_si256)
PYMERGE_BINARY(M, M, m_and, _mm256_and_ps)
PYMERGE_BINARY(M, M, m_or, _mm256_or_ps)
#undef PYMERGE_BINARY
#define PYMERGE_COMPARE(name, how)                                       \
  PYMERGE_INLINE M name(F x, F y) {                                      \
    return {_mm256_cmp_ps(x.a, y.a, how), _mm256_cmp_ps(x.b, y.b, how)}; \
  }
PYMERGE_COMPARE(f_nlt, _CMP_NLT_UQ)
PYMERGE_COMPARE(f_ge, _CMP_GE_OQ)
PYMERGE_COMPARE(f_gt, _CMP_GT_OQ)
PYMERGE_COMPARE(f_lt, _CMP_LT_OQ)
PYMERGE_COMPARE(f_le, _CMP_LE_OQ)
PYMERGE_COMPARE(f_eq, _CMP_EQ_OQ)
#undef PYMERGE_COMPARE
PYMERGE_INLINE M f_gt_in(M m, F a, F b) { return m_and(m, f_gt(a, b)); }
PYMERGE_INLINE F f_abs(F x) { return f_and(x, f_set(bits_float(0x7fffffffu))); }
PYMERGE_INLINE U f_bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
PYMERGE_INLINE F u_float(U x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
PYMERGE_INLINE F f_select(M m, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
PYMERGE_INLINE F f_keep(M m, F x) { return {_mm256_and_ps(m.a, x.a), _mm256_and_ps(m.b, x.b)}; }
PYMERGE_INLINE F f_add_kept(M m, F x, F y) { return f_add(x, f_keep(m, y)); }

PYMERGE_INLINE U u_load(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PYMERGE_INLINE void u_store(void* p, U x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
PYMERGE_INLINE void u_stream(void* p, U x) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_stream_si256(q, x.a);
  _mm256_stream_si256(q + 1, x.b);
}
PYMERGE_INLINE U u_set(uint32_t x) {
  return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))};
}
PYMERGE_INLINE M u_ge(U x, U y) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(x.a, y.a), x.a)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(x.b, y.b), x.b))};
}
PYMERGE_INLINE M u_lt(U x, U y) {
  const __m256i ones = _mm256_set1_epi32(-1);
  const M ge = u_ge(x, y);
  return {_mm256_xor_ps(ge.a, _mm256_castsi256_ps(ones)),
          _mm256_xor_ps(ge.b, _mm256_castsi256_ps(ones))};
}
PYMERGE_INLINE M u_fewer(U x, U y) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(y.a, x.a)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(y.b, x.b))};
}
PYMERGE_INLINE U u_keep(M m, U x) {
  return {_mm256_and_si256(_mm256_castps_si256(m.a), x.a),
          _mm256_and_si256(_mm256_castps_si256(m.b), x.b)};
}
PYMERGE_INLINE unsigned m_bits(M m) {
  return unsigned(_mm256_movemask_ps(m.a)) | unsigned(_mm256_movemask_ps(m.b)) << 8;
}
PYMERGE_INLINE M m_from(unsigned bits) {
  const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i a = _mm256_and_si256(_mm256_set1_epi32(int(bits & 255)), select);
  const __m256i b = _mm256_and_si256(_mm256_set1_epi32(int(bits >> 8 & 255)), select);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, select)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, select))};
}
PYMERGE_INLINE void m_store(uint16_t* p, M m) {
  const uint16_t bits = uint16_t(m_bits(m));
  memcpy(p, &bits, 2);
}

// Lane numbers of the set bits of a byte, packed.
struct CompressTable {
  uint64_t lanes[256] = {};
  constexpr CompressTable() {
    for (int bits = 0; bits < 256; ++bits) {
      uint64_t packed = 0;
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) packed |= uint64_t(lane) << (8 * count++);
      }
      lanes[bits] = packed;
    }
  }
};
static constexpr CompressTable compress_table;

PYMERGE_INLINE unsigned u_compress(uint32_t* p, M m, U x) {
  const unsigned low = unsigned(_mm256_movemask_ps(m.a)), high = unsigned(_mm256_movemask_ps(m.b));
  const __m256i order_low =
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(compress_table.lanes[low])));
  const __m256i order_high =
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(compress_table.lanes[high])));
  const unsigned count = unsigned(__builtin_popcount(low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(x.a, order_low));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + count),
                      _mm256_permutevar8x32_epi32(x.b, order_high));
  return count + unsigned(__builtin_popcount(high));
}

PYMERGE_INLINE U u_max(U x, U y) {
  return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)};
}

struct D {
  __m256d v[4];
};
PYMERGE_INLINE D d_load(const double* p) {
  return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8),
           _mm256_loadu_pd(p + 12)}};
}
PYMERGE_INLINE void d_store(double* p, D x) {
  for (int j = 0; j < 4; ++j) _mm256_storeu_pd(p + 4 * j, x.v[j]);
}
PYMERGE_INLINE D d_from(F x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.a)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1))}};
}
PYMERGE_INLINE D d_add(D x, F y) {
  const D wide = d_from(y);
  for (int j = 0; j < 4; ++j) x.v[j] = _mm256_add_pd(x.v[j], wide.v[j]);
  return x;
}
PYMERGE_INLINE D d_add_square(D x, F y) {
  const D wide = d_from(y);
  for (int j = 0; j < 4; ++j) x.v[j] = _mm256_fmadd_pd(wide.v[j], wide.v[j], x.v[j]);
  return x;
}

PYMERGE_INLINE D d_add_product(D x, D y, D z) {
  for (int j = 0; j < 4; ++j) x.v[j] = _mm256_fmadd_pd(y.v[j], z.v[j], x.v[j]);
  return x;
}
// The same in the flagged lanes.
PYMERGE_INLINE D d_add_kept(M m, D x, F y) { return d_add(x, f_keep(m, y)); }
PYMERGE_INLINE D d_add_square_kept(M m, D x, F y) { return d_add_square(x, f_keep(m, y)); }

PYMERGE_INLINE U u_lanes(uint32_t step) {
  const __m256i factor = _mm256_set1_epi32(int(step));
  return {_mm256_mullo_epi32(factor, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_mullo_epi32(factor, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

struct W {  // in 64-bit lanes four of them would take all registers
  U low, high;
};
PYMERGE_INLINE W w_set(uint32_t x) { return {u_set(x), u_set(0)}; }
PYMERGE_INLINE W w_count(uint32_t x) { return {u_add(u_set(x), u_lanes(1)), u_set(0)}; }
PYMERGE_INLINE void multiply(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
PYMERGE_INLINE W w_multiply(W x, uint32_t by) {
  const __m256i factor = _mm256_set1_epi32(int(by));
  W r;
  multiply(x.low.a, factor, r.high.a, r.low.a);
  multiply(x.low.b, factor, r.high.b, r.low.b);
  return r;
}
PYMERGE_INLINE W w_high(W x) { return {x.high, x.high}; }
PYMERGE_INLINE W w_xor(W x, W y, uint32_t z) {
  const __m256i all = _mm256_set1_epi32(int(z));
  return {{_mm256_xor_si256(_mm256_xor_si256(x.low.a, y.low.a), all),
           _mm256_xor_si256(_mm256_xor_si256(x.low.b, y.low.b), all)},
          x.high};
}
PYMERGE_INLINE void w_interleave(uint32_t* dst, W x0, W x1, W x2, W x3) {
  const auto half = [](uint32_t* to, __m256i y0, __m256i y1, __m256i y2, __m256i y3) {
    const __m256i a = _mm256_unpacklo_epi32(y0, y1), b = _mm256_unpackhi_epi32(y0, y1);
    const __m256i c = _mm256_unpacklo_epi32(y2, y3), d = _mm256_unpackhi_epi32(y2, y3);
    const __m256i lanes[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                              _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
    for (int j = 0; j < 4; ++j) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * j), _mm256_castsi256_si128(lanes[j]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 + 4 * j),
                       _mm256_extracti128_si256(lanes[j], 1));
    }
  };
  half(dst, x0.low.a, x1.low.a, x2.low.a, x3.low.a);
  half(dst + 32, x0.low.b, x1.low.b, x2.low.b, x3.low.b);
}
PYMERGE_INLINE uint64_t w_below(W x0, W x1, W x2, W x3, uint32_t bound) {
  const U all = u_set(bound);
  return _pdep_u64(m_bits(u_lt(x0.low, all)), 0x1111111111111111u) |
         _pdep_u64(m_bits(u_lt(x1.low, all)), 0x2222222222222222u) |
         _pdep_u64(m_bits(u_lt(x2.low, all)), 0x4444444444444444u) |
         _pdep_u64(m_bits(u_lt(x3.low, all)), 0x8888888888888888u);
}

PYMERGE_INLINE F f_load_bf16(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
PYMERGE_INLINE __m256i round_bf16(__m256 x) {  // to the upper halves
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
PYMERGE_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i kept = _mm256_castps_si256(_mm256_blendv_ps(
      _mm256_castsi256_ps(round_bf16(x)), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
  const __m256i high = _mm256_srli_epi32(kept, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
PYMERGE_INLINE void f_store_bf16(void* p, F x) {
  __m128i* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, narrow_bf16(x.a));
  _mm_storeu_si128(q + 1, narrow_bf16(x.b));
}
PYMERGE_INLINE F f_load_half(const void* p) {
  const __m128i* q = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
PYMERGE_INLINE void f_store_half(void* p, F x) {
  __m128i* q = static_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYMERGE_INLINE F f_load_even(const void* p) {
  const U raw = u_load(p);
  return u_float({_mm256_slli_epi32(raw.a, 16), _mm256_slli_epi32(raw.b, 16)});
}
PYMERGE_INLINE F f_load_odd(const void* p) { return u_float(u_and(u_load(p), u_set(0xffff0000u))); }
PYMERGE_INLINE U f_round_pairs(F even, F odd) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  return {_mm256_or_si256(_mm256_srli_epi32(round_bf16(even.a), 16),
                          _mm256_and_si256(round_bf16(odd.a), high)),
          _mm256_or_si256(_mm256_srli_epi32(round_bf16(even.b), 16),
                          _mm256_and_si256(round_bf16(odd.b), high))};
}
PYMERGE_INLINE void f_store_pairs(void* p, F even, F odd) { u_store(p, f_round_pairs(even, odd)); }
PYMERGE_INLINE void f_stream_pairs(void* p, F even, F odd) {
  u_stream(p, f_round_pairs(even, odd));
}

PYMERGE_INLINE F f_add_product(F x, F y, F z) {
  return {_mm256_fmadd_ps(y.a, z.a, x.a), _mm256_fmadd_ps(y.b, z.b, x.b)};
}
PYMERGE_INLINE F u_to_float(U x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
PYMERGE_INLINE U u_add_one(M m, U x) {
  return {_mm256_sub_epi32(x.a, _mm256_castps_si256(m.a)),
          _mm256_sub_epi32(x.b, _mm256_castps_si256(m.b))};
}
PYMERGE_INLINE F f_divide_by_count(F total, U ones) {
  return f_div(total, f_max(u_to_float(ones), f_set(1.0f)));
}
