// The vector shim for AVX-512 (F, BW, DQ, VL): 16 lanes in one register, masks in mask registers.
// Included inside the level's namespace and target region; vec_avx2.h and vec_portable.h define the
// same names.

#define PYMERGE_INLINE static inline __attribute__((always_inline))

using F = __m512;                       // 16 floats
using U = __m512i;                      // 16 uint32
using M = __mmask16;                    // 16 flags
constexpr int kVectors = 4;             // of every stream that the fused loops take at a time
constexpr int kHeldVectors = kVectors;  // of fp32 streams, where models stay in registers
constexpr int kHeldModels = 4;          // the most whose vectors stay in registers
constexpr int kPhiloxBlocks = 2;        // of 16 counters, at a time
// Bytes ahead in each stream of fp32, and the cache that they go to: 3 is the first level, 2 the
// second. Streams that begin on pages meet in the same few places of the first-level cache, where
// those of more than 8 models drive one another out before they are used. A core of a Zen 4 server,
// 2026-11-30, n = 4M (2M for K = 20), known, ns for 16 elements, and for the copy of the same
// bytes: fp32 K = 2, 4, 8, 20: 11.1, 17.5, 37.2, 163 (copy 9.3, 12.1, 22.0, 61) with 1 KB ahead in
// the first level, 8.9, 13.2, 24.5, 65 (8.2, 11.1, 20.2, 62) with 2 KB in the
// second, 9.4, 14.4, 39.1, 146 without. bf16 is as fast with either.
constexpr unsigned kAhead = 2048;
constexpr int kAheadCache = 2;

PYMERGE_INLINE F f_load(const void* p) { return _mm512_loadu_ps(p); }
PYMERGE_INLINE void f_store(void* p, F x) { _mm512_storeu_ps(p, x); }
PYMERGE_INLINE void f_stream(void* p, F x) { _mm512_stream_ps(static_cast<float*>(p), x); }
PYMERGE_INLINE F f_set(float x) { return _mm512_set1_ps(x); }
PYMERGE_INLINE F f_add(F a, F b) { return _mm512_add_ps(a, b); }
PYMERGE_INLINE F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
PYMERGE_INLINE F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
PYMERGE_INLINE F f_div(F a, F b) { return _mm512_div_ps(a, b); }
PYMERGE_INLINE F f_max(F a, F b) { return _mm512_max_ps(a, b); }
PYMERGE_INLINE F f_min(F a, F b) { return _mm512_min_ps(a, b); }
PYMERGE_INLINE F f_abs(F a) { return _mm512_abs_ps(a); }
PYMERGE_INLINE F f_and(F a, F b) { return _mm512_and_ps(a, b); }
PYMERGE_INLINE F f_xor(F a, F b) { return _mm512_xor_ps(a, b); }
// Not less than: true also where unordered.
PYMERGE_INLINE M f_nlt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
PYMERGE_INLINE M f_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
PYMERGE_INLINE M f_gt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
PYMERGE_INLINE M f_lt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
PYMERGE_INLINE M f_le(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
PYMERGE_INLINE M f_eq(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
PYMERGE_INLINE M f_gt_in(M m, F a, F b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_GT_OQ); }
// a + b in the flagged lanes, for an `a` that is not -0. In place: GCC 12 adds into copies of `a`,
// and copies of 512 bits take a vector port, a fifth of all that the fused loops have: 30 cycles
// for 16 elements with them (bf16, K = 4, data in the L1 cache).
PYMERGE_INLINE F f_add_kept(M m, F a, F b) {
  __asm__("vaddps %2, %0, %0 %{%1%}" : "+v"(a) : "Yk"(m), "v"(b));
  return a;
}
PYMERGE_INLINE F f_keep(M m, F a) { return _mm512_maskz_mov_ps(m, a); }  // a, else 0
PYMERGE_INLINE F f_select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
PYMERGE_INLINE U f_bits(F a) { return _mm512_castps_si512(a); }
PYMERGE_INLINE F u_float(U a) { return _mm512_castsi512_ps(a); }

PYMERGE_INLINE U u_load(const void* p) { return _mm512_loadu_si512(p); }
PYMERGE_INLINE void u_store(void* p, U x) { _mm512_storeu_si512(p, x); }
PYMERGE_INLINE U u_set(uint32_t x) { return _mm512_set1_epi32(int(x)); }
PYMERGE_INLINE U u_add(U a, U b) { return _mm512_add_epi32(a, b); }
PYMERGE_INLINE U u_sub(U a, U b) { return _mm512_sub_epi32(a, b); }
PYMERGE_INLINE U u_and(U a, U b) { return _mm512_and_si512(a, b); }
PYMERGE_INLINE M u_ge(U a, U b) { return _mm512_cmpge_epu32_mask(a, b); }
PYMERGE_INLINE F u_to_float(U a) { return _mm512_cvtepi32_ps(a); }  // below 2^31
// a + 1 in the flagged lanes, in place as above.
PYMERGE_INLINE U u_add_one(M m, U a) {
  __asm__("vpaddd %2, %0, %0 %{%1%}" : "+v"(a) : "Yk"(m), "v"(u_set(1)));
  return a;
}
PYMERGE_INLINE M u_lt(U a, U b) { return _mm512_cmplt_epu32_mask(a, b); }
PYMERGE_INLINE M u_fewer(U a, U b) { return u_lt(a, b); }  // of counts below 2^31
PYMERGE_INLINE U u_keep(M m, U a) { return _mm512_maskz_mov_epi32(m, a); }
// The flagged lanes, packed, at p; all 16 lanes there are written. Returns their number.
PYMERGE_INLINE unsigned u_compress(uint32_t* p, M m, U a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m, a));
  return unsigned(__builtin_popcount(m));
}

PYMERGE_INLINE unsigned m_bits(M m) { return m; }
PYMERGE_INLINE M m_from(unsigned bits) { return M(bits); }
// GCC 12 moves masks that are also stored through general registers and back: 49.8 cycles for 16
// elements, 48.1 so (Sapphire Rapids class, 2026-11-21, bf16, K = 8, data in the L2 cache).
PYMERGE_INLINE void m_store(uint16_t* p, M m) { __asm__("kmovw %1, %0" : "=m"(*p) : "k"(m)); }
PYMERGE_INLINE M m_and(M a, M b) { return _kand_mask16(a, b); }
PYMERGE_INLINE M m_or(M a, M b) { return _kor_mask16(a, b); }

PYMERGE_INLINE U u_max(U a, U b) { return _mm512_max_epu32(a, b); }

struct D {  // 16 doubles
  __m512d a, b;
};
PYMERGE_INLINE D d_load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
PYMERGE_INLINE void d_store(double* p, D x) {
  _mm512_storeu_pd(p, x.a);
  _mm512_storeu_pd(p + 8, x.b);
}
PYMERGE_INLINE D d_from(F x) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
          _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))};
}
PYMERGE_INLINE D d_add(D x, F y) {
  const D wide = d_from(y);
  return {_mm512_add_pd(x.a, wide.a), _mm512_add_pd(x.b, wide.b)};
}
// The square of a float is exact in binary64.
PYMERGE_INLINE D d_add_square(D x, F y) {
  const D wide = d_from(y);
  return {_mm512_fmadd_pd(wide.a, wide.a, x.a), _mm512_fmadd_pd(wide.b, wide.b, x.b)};
}

// The same in the flagged lanes; the conversion is shared with the sum over all.
PYMERGE_INLINE D d_add_kept(M m, D x, F y) {
  const D wide = d_from(y);
  return {_mm512_mask_add_pd(x.a, __mmask8(m), x.a, wide.a),
          _mm512_mask_add_pd(x.b, __mmask8(m >> 8), x.b, wide.b)};
}
PYMERGE_INLINE D d_add_square_kept(M m, D x, F y) {
  const D wide = d_from(y);
  return {_mm512_mask3_fmadd_pd(wide.a, wide.a, x.a, __mmask8(m)),
          _mm512_mask3_fmadd_pd(wide.b, wide.b, x.b, __mmask8(m >> 8))};
}

// x + y z. The product of what were floats is exact in binary64.
PYMERGE_INLINE D d_add_product(D x, D y, D z) {
  return {_mm512_fmadd_pd(y.a, z.a, x.a), _mm512_fmadd_pd(y.b, z.b, x.b)};
}

// 16 lanes of 64 bits for arithmetic on words, of which the low halves count.
struct W {
  U a, b;
};
PYMERGE_INLINE W w_set(uint32_t x) {
  const U all = _mm512_set1_epi64(x);
  return {all, all};
}
// x, x + 1, ...
PYMERGE_INLINE W w_count(uint32_t x) {
  const U all = _mm512_set1_epi64(x);
  return {_mm512_add_epi64(all, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm512_add_epi64(all, _mm512_setr_epi64(8, 9, 10, 11, 12, 13, 14, 15))};
}
PYMERGE_INLINE W w_multiply(W x, uint32_t by) {  // whole products
  const U factor = _mm512_set1_epi64(by);
  return {_mm512_mul_epu32(x.a, factor), _mm512_mul_epu32(x.b, factor)};
}
// By shuffles: shifts and products wait for the same port.
PYMERGE_INLINE W w_high(W x) {
  return {_mm512_shuffle_epi32(x.a, _MM_PERM_DDBB), _mm512_shuffle_epi32(x.b, _MM_PERM_DDBB)};
}
PYMERGE_INLINE W w_xor(W x, W y, uint32_t z) {
  const U all = u_set(z);
  return {_mm512_ternarylogic_epi32(x.a, y.a, all, 0x96),
          _mm512_ternarylogic_epi32(x.b, y.b, all, 0x96)};
}
// Lane i of the j-th to dst[4 i + j].
PYMERGE_INLINE void w_interleave(uint32_t* dst, W x0, W x1, W x2, W x3) {
  const U first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const U second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const auto half = [&](uint32_t* to, U y0, U y1, U y2, U y3) {
    const U front = _mm512_mask_mov_epi32(y0, 0xaaaa, _mm512_slli_epi64(y1, 32));
    const U back = _mm512_mask_mov_epi32(y2, 0xaaaa, _mm512_slli_epi64(y3, 32));
    u_store(to, _mm512_permutex2var_epi64(front, first, back));
    u_store(to + 16, _mm512_permutex2var_epi64(front, second, back));
  };
  half(dst, x0.a, x1.a, x2.a, x3.a);
  half(dst + 32, x0.b, x1.b, x2.b, x3.b);
}
// Bit 4 i + j says whether lane i of the j-th is below `bound`.
PYMERGE_INLINE uint64_t w_below(W x0, W x1, W x2, W x3, uint32_t bound) {
  const U bounds = u_set(bound);
  const auto pairs = [&](U even, U odd) -> uint64_t {
    const U both = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
    return u_lt(both, bounds);
  };
  return _pdep_u64(pairs(x0.a, x1.a) | pairs(x0.b, x1.b) << 16, 0x3333333333333333u) |
         _pdep_u64(pairs(x2.a, x3.a) | pairs(x2.b, x3.b) << 16, 0xccccccccccccccccu);
}

// 16 half-width elements from memory, and back with one rounding to nearest even.
PYMERGE_INLINE F f_load_bf16(const void* p) {
  const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return u_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
PYMERGE_INLINE void f_store_bf16(void* p, F x) {
  const U bits = f_bits(x);
  const U odd = u_and(_mm512_srli_epi32(bits, 16), u_set(1));
  const U rounded = u_add(u_add(bits, u_set(0x7fff)), odd);
  const U kept =
      _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u_set(0x7fc00000));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
PYMERGE_INLINE F f_load_half(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
PYMERGE_INLINE void f_store_half(void* p, F x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 32 bf16 as two vectors, the even and the odd elements: an upper half needs a mask only, a lower
// one a shift.
PYMERGE_INLINE F f_load_even(const void* p) { return u_float(_mm512_slli_epi32(u_load(p), 16)); }
PYMERGE_INLINE F f_load_odd(const void* p) {
  return u_float(_mm512_and_si512(u_load(p), u_set(0xffff0000u)));
}
// Finite or infinite values, rounded to nearest even: up by one where the lower half is above
// 0x8000, or equal to it below an odd upper half.
PYMERGE_INLINE U f_round_pairs(F even, F odd) {
  const U high_mask = u_set(0xffff0000u);
  const U high =
      _mm512_ternarylogic_epi32(_mm512_srli_epi32(f_bits(even), 16), f_bits(odd), high_mask,
                                0xf8);  // a | (b & c)
  const U low =
      _mm512_ternarylogic_epi32(_mm512_slli_epi32(f_bits(odd), 16), f_bits(even), high_mask,
                                0xf4);  // a | (b & ~c)
  const U sticky = _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi16(1), 0xf8);
  const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(int16_t(0x8000)));
  return _mm512_mask_sub_epi16(high, up, high, _mm512_set1_epi16(-1));
}
PYMERGE_INLINE void f_store_pairs(void* p, F even, F odd) { u_store(p, f_round_pairs(even, odd)); }
PYMERGE_INLINE void f_stream_pairs(void* p, F even, F odd) {
  _mm512_stream_si512(static_cast<__m512i*>(p), f_round_pairs(even, odd));
}
PYMERGE_INLINE void u_stream(void* p, U x) { _mm512_stream_si512(static_cast<__m512i*>(p), x); }

// a + b * c, to see whether anything is not finite: its rounding does not matter.
PYMERGE_INLINE F f_add_product(F a, F b, F c) { return _mm512_fmadd_ps(b, c, a); }
// total / max(ones, 1), correctly rounded, for a total that is 0 where `ones` is, which is at
// most 5: by the correctly rounded reciprocal and one correction, which is exact there,
// subnormal quotients included (tests/ties/test_native.py tries every significand); 6 has quotients
// half way between two subnormal numbers. Sapphire Rapids class, 2026-11-21, K = 4, bf16, data in
// the L2 cache: 32 cycles for 16 elements with vdivps, 27 so.
PYMERGE_INLINE F f_divide_by_count(F total, U ones) {
  const F reciprocals =
      _mm512_setr_ps(1, 1, 0.5f, 1.0f / 3, 0.25f, 0.2f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const F reciprocal = _mm512_permutexvar_ps(ones, reciprocals);
  const F count = u_to_float(ones);
  const F quotient = f_mul(total, reciprocal);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, count, total), reciprocal, quotient);
}

// Set bits of `lines` cache lines, where the processor has the instruction: 2 of 31 cycles for 16
// elements (bf16, K = 4).
#define PYMERGE_VECTOR_POPCOUNT 1
__attribute__((target("avx512vpopcntdq"), unused)) static uint64_t ones_in_lines(const void* p,
                                                                                 unsigned lines) {
  __m512i ones = _mm512_setzero_si512();
  for (unsigned j = 0; j < lines; ++j) {
    ones = _mm512_add_epi64(
        ones, _mm512_popcnt_epi64(_mm512_loadu_si512(static_cast<const char*>(p) + 64 * j)));
  }
  return uint64_t(_mm512_reduce_add_epi64(ones));
}
// A bit for each 64-bit word of 32 that has a bit of `low` that is not in `high`.
PYMERGE_INLINE uint32_t words_of_lines_with(const void* low, const void* high) {
  uint32_t words = 0;
  for (unsigned j = 0; j < 4; ++j) {
    const U bits = _mm512_andnot_si512(u_load(static_cast<const char*>(high) + 64 * j),
                                       u_load(static_cast<const char*>(low) + 64 * j));
    words |= uint32_t(_mm512_test_epi64_mask(bits, bits)) << (8 * j);
  }
  return words;
}
static const bool has_vector_popcount = __builtin_cpu_supports("avx512vpopcntdq");
