// The loops of kernels.h over the vector shim, compiled once a level inside the level's namespace.
// Streams are read and written once; all other state of a block stays in registers or in the L1 and
// L2 caches.

// --- loads of any type ---------------------------------------------------------------------------

template <class T>
PYMERGE_INLINE F load16(const void* p) {
  if constexpr (std::is_same_v<T, float>) return f_load(p);
  if constexpr (std::is_same_v<T, BFloat16>) return f_load_bf16(p);
  if constexpr (std::is_same_v<T, Half>) return f_load_half(p);
}

PYMERGE_INLINE void store16(float* p, F x) { f_store(p, x); }
PYMERGE_INLINE void store16(BFloat16* p, F x) { f_store_bf16(p, x); }
PYMERGE_INLINE void store16(Half* p, F x) { f_store_half(p, x); }

// The first `lanes` elements at p, zeros behind them.
template <class T>
PYMERGE_INLINE F load_part(const char* p, unsigned lanes) {
  if (lanes >= 16) return load16<T>(p);
  T padded[16] = {};
  memcpy(padded, p, lanes * sizeof(T));
  return load16<T>(padded);
}

// body(T()) for the type.
template <class Body>
static inline void with_type(DType type, const Body& body) {
  switch (type) {
    case DType::kFloat32:
      return body(float());
    case DType::kFloat16:
      return body(Half());
    default:
      return body(BFloat16());
  }
}

// body(group's vector of task vector elements, first element, lanes) over `count` elements from i.
template <class X, class B, class Body>
static inline void each_delta(const void* x, const void* base, uint64_t count, const Body& body) {
  const char* px = static_cast<const char*>(x);
  const char* pb = static_cast<const char*>(base);
  uint64_t j = 0;
  if (pb == nullptr) {
    for (; j + 16 <= count; j += 16) body(load16<X>(px + j * sizeof(X)), j, 16u);
    if (j < count)
      body(load_part<X>(px + j * sizeof(X), unsigned(count - j)), j, unsigned(count - j));
    return;
  }
  for (; j + 16 <= count; j += 16) {
    body(f_sub(load16<X>(px + j * sizeof(X)), load16<B>(pb + j * sizeof(B))), j, 16u);
  }
  if (j < count) {
    const unsigned lanes = unsigned(count - j);
    body(f_sub(load_part<X>(px + j * sizeof(X), lanes), load_part<B>(pb + j * sizeof(B), lanes)), j,
         lanes);
  }
}

PYMERGE_INLINE U key16(F delta) {
  const U key = u_and(f_bits(delta), u_set(0x7fffffffu));
  return u_keep(u_lt(key, u_set(0x7f800001u)), key);  // N1
}

static void keys_loop(const Buffer& x, const Buffer& base, uint64_t i, uint64_t count,
                      uint32_t* dst) {
  with_type(x.type, [&](auto tx) {
    with_type(base.type, [&](auto tb) {
      each_delta<decltype(tx), decltype(tb)>(
          x.at(i), base.data ? base.at(i) : nullptr, count,
          [&](F d, uint64_t j, unsigned) { u_store(dst + j, key16(d)); });
    });
  });
}

static void deltas_loop(const Buffer& x, const Buffer& base, uint64_t i, uint64_t count,
                        float* dst) {
  with_type(x.type, [&](auto tx) {
    with_type(base.type, [&](auto tb) {
      each_delta<decltype(tx), decltype(tb)>(
          x.at(i), base.data ? base.at(i) : nullptr, count,
          [&](F d, uint64_t j, unsigned) { f_store(dst + j, d); });
    });
  });
}

// --- selection -----------------------------------------------------------------------------------

static uint64_t partition_loop(const uint32_t* keys, uint64_t count, uint32_t low, uint32_t high,
                               uint32_t* dst, uint64_t* above) {
  const U vlow = u_set(low), vspan = u_set(high - low), vhigh = u_set(high);
  uint64_t packed = 0, over = 0, j = 0;
  for (; j + 16 <= count; j += 16) {
    const U key = u_load(keys + j);
    over += uint64_t(__builtin_popcount(m_bits(u_ge(key, vhigh))));
    packed += u_compress(dst + packed, u_lt(u_sub(key, vlow), vspan), key);
  }
  for (; j < count; ++j) {
    const uint32_t key = keys[j];
    over += key >= high;
    dst[packed] = key;
    packed += key - low < high - low;
  }
  *above += over;
  return packed;
}

static uint64_t count_loop(const uint32_t* keys, uint64_t count, uint32_t low, uint32_t high,
                           uint64_t* above) {
  const U vlow = u_set(low), vspan = u_set(high - low), vhigh = u_set(high);
  uint64_t inside = 0, over = 0, j = 0;
  for (; j + 16 <= count; j += 16) {
    const U key = u_load(keys + j);
    over += uint64_t(__builtin_popcount(m_bits(u_ge(key, vhigh))));
    inside += uint64_t(__builtin_popcount(m_bits(u_lt(u_sub(key, vlow), vspan))));
  }
  for (; j < count; ++j) {
    over += keys[j] >= high;
    inside += keys[j] - low < high - low;
  }
  *above += over;
  return inside;
}

static void count_units_loop(const uint32_t* keys, uint64_t units, unsigned unit, uint32_t bound,
                             uint16_t* counts) {
  const U vbound = u_set(bound);
  for (uint64_t u = 0; u < units; ++u) {
    unsigned count = 0;
    for (unsigned j = 0; j < unit; j += 16) {
      count += unsigned(__builtin_popcount(m_bits(u_ge(u_load(keys + u * unit + j), vbound))));
    }
    counts[u] = uint16_t(count);
  }
}

// --- the fused loop ------------------------------------------------------------------------------

// How a group of elements is loaded and stored: fp32 as 16 in order, bf16 as 32 in two halves, even
// and odd.
template <class T>
struct Group;
template <>
struct Group<float> {
  static constexpr unsigned kElements = 16, kParts = 1;
  template <int kPart>
  PYMERGE_INLINE F load(const char* p) {
    return f_load(p);
  }
  PYMERGE_INLINE void put(char* p, const F* parts, bool stream) {
    stream ? f_stream(p, parts[0]) : f_store(p, parts[0]);
  }
};
template <>
struct Group<BFloat16> {
  static constexpr unsigned kElements = 32, kParts = 2;
  template <int kPart>
  PYMERGE_INLINE F load(const char* p) {
    return kPart == 0 ? f_load_even(p) : f_load_odd(p);
  }
  PYMERGE_INLINE void put(char* p, const F* parts, bool stream) {
    stream ? f_stream_pairs(p, parts[0], parts[1]) : f_store_pairs(p, parts[0], parts[1]);
  }
};

#if defined(PYMERGE_NO_FUSED)
static FusedLoop fused_table(DType, int, Weights, Compare, bool) { return nullptr; }
#else
// One part of a group: T1 and T3 to T6. Returns the output before the cast.
//
// The threshold is above 0, so whatever is kept is not zero, and trimmed zeros change no sum:
// partial sums start from +0 and never become -0. With unit weights a kept element agrees iff its
// value times the elected sign is at least the threshold, which is one comparison.
template <class T, int kCount, Weights kWeights, Compare kCompare, bool kMajority, bool kScaled,
          int kPart>
PYMERGE_INLINE F fused_part(const FusedArgs& a, size_t at, unsigned word, FusedMasks& masks,
                            F& check) {
  const F zero = f_set(0.0f);
  const F base = Group<T>::template load<kPart>(static_cast<const char*>(a.base) + at);
  F value[kCount];
  F delta[kCount];
  M keep[kCount];
  F sum = zero;
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    delta[k] = f_sub(Group<T>::template load<kPart>(static_cast<const char*>(a.model[k]) + at),
                     base);  // T1
    const F size = f_abs(delta[k]);
    keep[k] = f_nlt(size, f_set(a.lower[k]));  // T3; NaN passes, to be seen by `check`
    m_store(&masks.keep[k][word], keep[k]);
    if (kCompare != Compare::kThreshold)
      m_store(&masks.high[k][word], f_ge(size, f_set(a.high[k])));
    if (kCompare == Compare::kBracket) m_store(&masks.low[k][word], f_ge(size, f_set(a.low[k])));
    value[k] = kWeights == Weights::kUnit || kWeights == Weights::kMerge
                   ? delta[k]
                   : f_mul(delta[k], f_set(a.weight[k]));
    // T4. A kept task vector is not zero, but its product with a weight may be -0.
    constexpr bool kNoZeros = kWeights == Weights::kUnit || kWeights == Weights::kMerge;
    sum = k == 0 && kNoZeros ? f_keep(keep[k], value[k]) : f_add_if(keep[k], sum, value[k]);
  }
  F merged;
  if constexpr (kWeights == Weights::kNoElection) {
    F divisor = f_set(a.denominator);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      m_store(&masks.agree[k][word], f_gt_in(keep[k], value[k], zero));
      m_store(&masks.disagree[k][word], f_lt_in(keep[k], value[k], zero));
      divisor = f_add_if(keep[k], divisor, f_set(a.increment[k]));
    }
    merged = f_div(sum, f_select(f_eq(divisor, zero), f_set(1.0f), divisor));  // T5
  } else {
    const F sign_bit = f_set(-0.0f);
    F elected;  // the elected sign's bit
    if constexpr (kMajority) {
      m_store(&masks.positive[word], f_gt(sum, zero));
      const M down = f_sign(sum);  // S is never -0
      m_store(&masks.negative[word], down);
      elected = f_keep(m_or(down, m_and(f_eq(sum, zero), m_from(a.zero_negative))), sign_bit);
    } else {
      elected = f_and(sum, sign_bit);
    }
    F total = zero;
    F divisor = f_set(a.denominator);
    M first = M(), second = M();  // who agrees, for kCount = 2
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      const F flipped = f_xor(value[k], elected);
      if constexpr (kWeights == Weights::kUnit) {
        const M agree = f_ge(flipped, f_set(a.lower[k]));
        m_store(&masks.agree[k][word], agree);
        total = k == 0 ? f_keep(agree, value[k]) : f_add_if(agree, total, value[k]);
        if constexpr (kCount == 1) continue;
        if constexpr (kCount == 2) {
          (k == 0 ? first : second) = agree;
        } else {
          divisor = k == 0 ? f_keep(agree, f_set(1.0f)) : f_add_if(agree, divisor, f_set(1.0f));
        }
      } else {
        const M agree = f_gt_in(keep[k], flipped, zero);
        m_store(&masks.agree[k][word], agree);
        m_store(&masks.disagree[k][word], f_lt_in(keep[k], flipped, zero));
        const F product =
            kWeights == Weights::kBoth ? value[k] : f_mul(delta[k], f_set(a.weight[k]));
        total = f_add_if(agree, total, product);
        divisor = f_add_if(agree, divisor, f_set(a.increment[k]));
      }
    }
    if constexpr (kWeights == Weights::kUnit) {  // T5
      merged = total;
      if constexpr (kCount == 2) {  // halving is exact division by 2
        merged = f_select(m_and(first, second), f_mul(total, f_set(0.5f)), total);
      } else if constexpr (kCount > 2) {
        merged = f_divide_by_count<kCount>(total, divisor);
      }
    } else {
      merged = f_div(total, f_select(f_eq(divisor, zero), f_set(1.0f), divisor));
    }
  }
  check = f_add_product(check, sum, merged);
  if (kScaled) merged = f_mul(f_set(a.scaling), merged);
  return f_add(base, merged);  // T6; without a base, `base` is -0
}

// Bytes ahead in each stream. Sapphire Rapids class, 2 cores, 2026-11-21, n = 16M, K = 4, of the
// copy bandwidth: fp32 76 % without, 88 % at 512, 87 to 90 % at 1024 and 2048; bf16 68 % without,
// 72 to 76 % with any of them.
constexpr size_t kPrefetch = 1024;

template <class T, int kCount, Weights kWeights, Compare kCompare, bool kMajority, bool kScaled>
static bool fused_loop(const FusedArgs& args, unsigned count, FusedMasks& masks) {
  if (kScaled && kWeights == Weights::kUnit && args.scaling == 1.0f)
    return fused_loop<T, kCount, kWeights, kCompare, kMajority, false>(args, count, masks);
  const FusedArgs a = args;
  F check = f_set(1.0f);
  unsigned word = 0;
  for (unsigned j = 0; j < count; j += Group<T>::kElements, word += Group<T>::kParts) {
    const size_t at = size_t(j) * sizeof(T);
    __builtin_prefetch(static_cast<const char*>(a.base) + at + kPrefetch);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k)
      __builtin_prefetch(static_cast<const char*>(a.model[k]) + at + kPrefetch);
    F parts[Group<T>::kParts];
    parts[0] =
        fused_part<T, kCount, kWeights, kCompare, kMajority, kScaled, 0>(a, at, word, masks, check);
    if constexpr (Group<T>::kParts == 2) {
      parts[1] = fused_part<T, kCount, kWeights, kCompare, kMajority, kScaled, 1>(a, at, word + 1,
                                                                                  masks, check);
    }
    Group<T>::put(static_cast<char*>(a.out) + at, parts, a.stream);
  }
  // A kept NaN or infinity makes its sum not finite, an overflow of the merged value that one, and
  // either stays in `check`, as does the overflow of their product, which only costs time.
  return m_bits(f_lt(f_abs(check), f_set(INFINITY))) == 0xffffu;
}

template <class T, int kCount>
static FusedLoop fused_of(Weights weights, Compare compare, bool majority) {
#define PYMERGE_FUSED(w, c)                                                                        \
  if (weights == Weights::w && compare == Compare::c) {                                            \
    return majority && Weights::w != Weights::kNoElection                                          \
               ? fused_loop<T, kCount, Weights::w, Compare::c, Weights::w != Weights::kNoElection, \
                            true>                                                                  \
               : fused_loop<T, kCount, Weights::w, Compare::c, false, true>;                       \
  }
  PYMERGE_FUSED(kUnit, kThreshold)
  PYMERGE_FUSED(kUnit, kHigh)
  PYMERGE_FUSED(kUnit, kBracket)
  PYMERGE_FUSED(kBoth, kThreshold)
  PYMERGE_FUSED(kBoth, kBracket)
  PYMERGE_FUSED(kMerge, kThreshold)
  PYMERGE_FUSED(kMerge, kBracket)
  PYMERGE_FUSED(kNoElection, kThreshold)
  PYMERGE_FUSED(kNoElection, kBracket)
#undef PYMERGE_FUSED
  return nullptr;
}

template <class T>
static FusedLoop fused_of(int count, Weights weights, Compare compare, bool majority) {
  switch (count) {
#if !defined(PYMERGE_FEW_FUSED)
    case 1:
      return fused_of<T, 1>(weights, compare, majority);
    case 3:
      return fused_of<T, 3>(weights, compare, majority);
    case 5:
      return fused_of<T, 5>(weights, compare, majority);
    case 6:
      return fused_of<T, 6>(weights, compare, majority);
    case 7:
      return fused_of<T, 7>(weights, compare, majority);
    case 8:
      return fused_of<T, 8>(weights, compare, majority);
#endif
    case 2:
      return fused_of<T, 2>(weights, compare, majority);
    case 4:
      return fused_of<T, 4>(weights, compare, majority);
    default:
      return nullptr;
  }
}

static FusedLoop fused_table(DType type, int count, Weights weights, Compare compare,
                             bool majority) {
  if (compare == Compare::kHigh && weights != Weights::kUnit) compare = Compare::kBracket;
  if (type == DType::kFloat32) return fused_of<float>(count, weights, compare, majority);
  if (type == DType::kBFloat16) return fused_of<BFloat16>(count, weights, compare, majority);
  return nullptr;
}

#endif  // PYMERGE_NO_FUSED

PYMERGE_INLINE uint64_t word64(const uint16_t* words, unsigned j) {
  uint64_t bits;
  memcpy(&bits, words + 4 * j, 8);
  return bits;
}

PYMERGE_INLINE uint64_t ones_in(const uint16_t* words) {
#if defined(PYMERGE_VECTOR_POPCOUNT)
  if (has_vector_popcount) return ones_in_lines(words, kWords * 2 / 64);
#endif
  uint64_t ones = 0;
#pragma GCC unroll 8
  for (unsigned j = 0; j < kWords / 4; ++j)
    ones += uint64_t(__builtin_popcountll(word64(words, j)));
  return ones;
}

static void fused_counts_loop(FusedMasks& masks, int count, unsigned elements, Weights weights,
                              Compare compare, bool majority, FusedCounts& counts) {
  const unsigned words = elements / 16;
  if (words < kWords) {  // so that all loops run over whole arrays
    const size_t rest = (kWords - words) * sizeof(uint16_t);
    for (int k = 0; k < count; ++k) {
      memset(masks.keep[k] + words, 0, rest);
      memset(masks.high[k] + words, 0, rest);
      memset(masks.agree[k] + words, 0, rest);
      memset(masks.disagree[k] + words, 0, rest);
    }
    if (majority) {
      memset(masks.positive + words, 0, rest);
      memset(masks.negative + words, 0, rest);
    }
  }
  for (int k = 0; k < count; ++k) {
    counts.kept[k] += ones_in(masks.keep[k]);
    if (compare != Compare::kThreshold) counts.high[k] += ones_in(masks.high[k]);
  }
  // kept and not agreeing is disagreeing, where the threshold is above 0
  uint16_t agree[kWords], conflict[kWords], undecided[kWords];
  for (unsigned j = 0; j < kWords; ++j) agree[j] = conflict[j] = 0;
  for (int k = 0; k < count; ++k) {
    for (unsigned j = 0; j < kWords; ++j) agree[j] = uint16_t(agree[j] | masks.agree[k][j]);
    if (weights == Weights::kUnit) {
      for (unsigned j = 0; j < kWords; ++j) {
        conflict[j] = uint16_t(conflict[j] | (masks.keep[k][j] & ~masks.agree[k][j]));
      }
    } else {
      for (unsigned j = 0; j < kWords; ++j)
        conflict[j] = uint16_t(conflict[j] | masks.disagree[k][j]);
    }
  }
  for (unsigned j = 0; j < kWords; ++j) conflict[j] = uint16_t(conflict[j] & agree[j]);
  counts.conflicts += ones_in(conflict);
  if (weights == Weights::kNoElection || !majority) return;
  for (unsigned j = 0; j < kWords; ++j) {
    undecided[j] = uint16_t(conflict[j] & ~masks.positive[j] & ~masks.negative[j]);
  }
  counts.positive += ones_in(masks.positive);
  counts.negative += ones_in(masks.negative);
  counts.undecided += ones_in(undecided);
}

// Which of the 64-bit words have a bit that is in `low` and not in `high`.
PYMERGE_INLINE uint32_t words_with(const uint16_t* low, const uint16_t* high) {
#if defined(PYMERGE_VECTOR_POPCOUNT)
  return words_of_lines_with(low, high);
#endif
  uint32_t words = 0;
  for (unsigned j = 0; j < kWords / 4; ++j)
    words |= uint32_t((word64(low, j) & ~word64(high, j)) != 0) << j;
  return words;
}

// Candidates are few, about one in 256 elements, and one or two in a 64-bit word that has any: two
// are written, and those that are there counted, without a branch on how many that is.
template <class T>
static void candidates_of(const FusedMasks& masks, int model, unsigned count, uint32_t first,
                          Collected& list) {
  static_assert(kWords / 4 <= 32);
  uint32_t words = words_with(masks.low[model], masks.high[model]);
  if (count < kFusedBlock) words &= uint32_t((uint64_t(1) << ((count + 63) / 64)) - 1);
  uint32_t* pending = list.pending + list.pending_count;
  const auto position = [](unsigned bit) {
    if (Group<T>::kParts == 2)
      return (bit & 32u) + (bit & 15u) * 2 + (bit >> 4 & 1u);  // even ones first
    return bit;
  };
  for (; words != 0; words &= words - 1) {
    const unsigned j = unsigned(__builtin_ctz(words));
    uint64_t bits = word64(masks.low[model], j) & ~word64(masks.high[model], j);
    if (64 * (j + 1) > count) bits &= (uint64_t(1) << (count - 64 * j)) - 1;
    const uint64_t more = bits & (bits - 1);
    const uint32_t at = first + 64 * j;
    pending[0] = at + position(unsigned(__builtin_ctzll(bits | uint64_t(1) << 63)));
    pending[1] = at + position(unsigned(__builtin_ctzll(more | uint64_t(1) << 63)));
    if (__builtin_expect((more & (more - 1)) != 0, 0)) {
      uint32_t* p = pending + 2;
      for (uint64_t left = more & (more - 1); left != 0; left &= left - 1)
        *p++ = at + position(unsigned(__builtin_ctzll(left)));
    }
    pending += __builtin_popcountll(bits);
  }
  list.pending_count = unsigned(pending - list.pending);
}

static void candidates_loop(DType type, const FusedMasks& masks, int model, unsigned count,
                            uint32_t first, Collected& list) {
  if (type == DType::kFloat32) return candidates_of<float>(masks, model, count, first, list);
  candidates_of<BFloat16>(masks, model, count, first, list);
}

// A single one does not fill a vector, and its loads are from the L2 cache: without vectors, and
// without a branch on what it is.
template <class T>
static void collect_of(const void* const* xs, const void* bases, int model, Collected& list) {
  const unsigned count = list.pending_count;
  list.pending_count = 0;
  if (list.count + count > list.capacity) list.overflow = true;
  if (list.overflow) return;
  const uint32_t near_low = list.near_low;
  // One is written behind the last.
  const uint32_t near_span = list.near_count + count < list.near_capacity ? list.near_span : 0;
  uint32_t *keys = list.keys + list.count, *positions = list.positions + list.count;
  uint32_t* near_keys = list.near_keys + list.near_count;
  const unsigned models = unsigned(list.models);
  uint32_t* record = list.records + list.near_count * (models + 2);
  uint32_t near_at[kPendingRoom];
  unsigned near = 0, others = 0;
  const uint32_t* pending = list.pending;
  const void* x = xs[model];
  for (unsigned j = 0; j < count; ++j) {
    const uint32_t at = pending[j];
    const float base = bases == nullptr ? -0.0f : to_float(load_as<T>(bases, at));
    const uint32_t key = key_of(to_float(load_as<T>(x, at)) - base);
    const bool is_near = key - near_low < near_span;
    keys[others] = near_keys[near] = key;
    positions[others] = at;
    near_at[near] = at;
    others += unsigned(!is_near);
    near += unsigned(is_near);
  }
  // A record is one cache line or two, where arrays of their own for each model would be as many.
  for (unsigned j = 0; j < near; ++j, record += models + 2) {
    const uint32_t at = near_at[j];
    record[0] = at;
    for (unsigned k = 0; k < models; ++k)
      record[1 + k] = float_bits(to_float(load_as<T>(xs[k], at)));
    record[1 + models] = float_bits(bases == nullptr ? -0.0f : to_float(load_as<T>(bases, at)));
  }
  list.count += others;
  list.near_count += near;
  // The lists are written once and far apart: their next lines are not in the caches.
  for (unsigned line = 1; line < 3; ++line) {
    __builtin_prefetch(keys + others + 16 * line, 1);
    __builtin_prefetch(near_keys + near + 16 * line, 1);
    __builtin_prefetch(positions + others + 16 * line, 1);
  }
  for (unsigned line = 1; line < 9; ++line) __builtin_prefetch(record + 16 * line, 1);
}

static void collect_loop(DType type, const void* const* xs, const void* base, int model,
                         Collected& list) {
  if (type == DType::kFloat32) return collect_of<float>(xs, base, model, list);
  collect_of<BFloat16>(xs, base, model, list);
}

// --- the general loop ----------------------------------------------------------------------------

static void random_words(uint64_t i, unsigned count, uint32_t model, uint64_t key,
                         uint32_t* words) {
  const unsigned skip = unsigned(i & 3);
  uint32_t buffer[64];
  for (unsigned j = 0; j < count + skip; j += 64) {
    // Sixteen groups at a time, in a form that compilers turn into vector multiplications.
    uint32_t c0[16], c1[16], c2[16], c3[16];
    for (unsigned l = 0; l < 16; ++l) {
      const uint64_t group = (i >> 2) + j / 4 + l;
      c0[l] = uint32_t(group);
      c1[l] = uint32_t(group >> 32);
      c2[l] = model;
      c3[l] = 0;
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (unsigned l = 0; l < 16; ++l) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0[l], p1 = uint64_t(0xCD9E8D57u) * c2[l];
        c0[l] = uint32_t(p1 >> 32) ^ c1[l] ^ k0;
        c1[l] = uint32_t(p1);
        c2[l] = uint32_t(p0 >> 32) ^ c3[l] ^ k1;
        c3[l] = uint32_t(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (unsigned l = 0; l < 16; ++l) {
      buffer[4 * l] = c0[l];
      buffer[4 * l + 1] = c1[l];
      buffer[4 * l + 2] = c2[l];
      buffer[4 * l + 3] = c3[l];
    }
    const unsigned from = j == 0 ? skip : 0;
    const unsigned to = count + skip - j < 64 ? count + skip - j : 64;
    memcpy(words + (j + from - skip), buffer + from, (to - from) * 4);
  }
}

// Keep bits of T3 and trimmed, rescaled task vectors of one model; adds what is kept to *check.
template <class T>
static void trim_model(const GeneralArgs& a, int k, uint64_t i, unsigned count,
                       const GeneralScratch& s, F& check, uint64_t& kept) {
  const char* x = static_cast<const char*>(a.models[k].data) + i * sizeof(T);
  uint16_t* keep_bits = s.keep + size_t(k) * (s.block / 16);
  float* out = s.delta + size_t(k) * s.block;
  if (a.trim == Trim::kRandom) {
    if (a.cutoff[k] >> 32 != 0) {
      for (unsigned g = 0; 16 * g < count; ++g) keep_bits[g] = 0xffff;
    } else {
      random_words(a.first + i, count, uint32_t(k), a.key, s.words);
      const U cutoff = u_set(uint32_t(a.cutoff[k]));
      for (unsigned g = 0; 16 * g < count; ++g)
        m_store(keep_bits + g, u_lt(u_load(s.words + 16 * g), cutoff));
    }
  }
  const F lower = f_set(a.lower[k]), upper = f_set(a.upper[k]), by = f_set(a.rule.rescale_by[k]);
  const Rescale rescale = a.rule.rescale[k];
  const bool has_base = a.base.data != nullptr;
  for (unsigned g = 0; 16 * g < count; ++g) {
    const unsigned lanes = count - 16 * g < 16 ? count - 16 * g : 16;
    F d = load_part<T>(x + size_t(16) * g * sizeof(T), lanes);
    if (has_base) d = f_sub(d, f_load(s.base + 16 * g));
    unsigned bits = 0xffffu;
    if (a.trim == Trim::kRandom) {
      bits = keep_bits[g];
    } else if (a.trim != Trim::kNone) {
      const F size = f_abs(d);
      bits = m_bits(m_and(f_ge(size, lower), f_le(size, upper)));
    }
    bits &= 0xffffu >> (16 - lanes);
    keep_bits[g] = uint16_t(bits);
    kept += uint64_t(__builtin_popcount(bits));
    if (rescale == Rescale::kDivide) d = f_div(d, by);
    if (rescale == Rescale::kMultiply) d = f_mul(d, by);
    check = f_add(check, d);
    f_store(out + 16 * g, d);
  }
}

// T4 for one model: adds its kept election values to the sums.
template <Elect kElect>
static void elect_model(const GeneralArgs& a, int k, unsigned groups, const GeneralScratch& s) {
  const uint16_t* keep_bits = s.keep + size_t(k) * (s.block / 16);
  const float* delta = s.delta + size_t(k) * s.block;
  const F weight = f_set(a.rule.elect_weights[k]), zero = f_set(0.0f);
  for (unsigned g = 0; g < groups; ++g) {
    const M keep = m_from(keep_bits[g]);
    const F value = f_mul(f_load(delta + 16 * g), weight);
    const M above = f_gt_in(keep, value, zero), below = f_lt_in(keep, value, zero);
    s.above[g] = uint16_t(s.above[g] | m_bits(above));
    s.below[g] = uint16_t(s.below[g] | m_bits(below));
    if (kElect == Elect::kNone) continue;
    F sum = f_load(s.sum + 16 * g);
    if (kElect == Elect::kSum) {
      sum = f_add_if(keep, sum, value);
    } else {
      sum = f_add_if(below, f_add_if(above, sum, f_set(1.0f)), f_set(-1.0f));
    }
    f_store(s.sum + 16 * g, sum);
  }
}

// T5 for one model: adds its agreeing products to the numerators and denominators.
template <Merge kMerge>
static void merge_model(const GeneralArgs& a, int k, unsigned groups, const GeneralScratch& s) {
  const uint16_t* keep_bits = s.keep + size_t(k) * (s.block / 16);
  const float* delta = s.delta + size_t(k) * s.block;
  const F elect_weight = f_set(a.rule.elect_weights[k]), weight = f_set(a.rule.weights[k]);
  const F zero = f_set(0.0f), one = f_set(1.0f);
  const bool elects = a.rule.elect != Elect::kNone;
  for (unsigned g = 0; g < groups; ++g) {
    const F d = f_load(delta + 16 * g);
    unsigned bits = keep_bits[g];
    if (elects) {
      const F value = f_mul(d, elect_weight);
      const unsigned negative = s.negative[g];
      bits &= (m_bits(f_gt(value, zero)) & ~negative) | (m_bits(f_lt(value, zero)) & negative);
    }
    const F product = f_mul(d, weight);
    const M agree = m_from(bits);
    F total = f_load(s.numerator + 16 * g);
    if (kMerge == Merge::kMax) {
      total = f_select(f_gt_in(agree, f_abs(product), f_abs(total)), product, total);
    } else {
      total = f_add_if(agree, total, product);
    }
    f_store(s.numerator + 16 * g, total);
    if (kMerge == Merge::kWeightedMean && elects) {
      f_store(s.denominator + 16 * g, f_add_if(agree, f_load(s.denominator + 16 * g), weight));
    } else if (kMerge == Merge::kMean) {
      const M counts = f_gt_in(agree, f_abs(d), zero);
      f_store(s.denominator + 16 * g, f_add_if(counts, f_load(s.denominator + 16 * g), one));
    }
  }
}

template <class T>
static void finish_block(const GeneralArgs& a, uint64_t i, unsigned count,
                         const GeneralScratch& s) {
  char* out = static_cast<char*>(a.out) + i * sizeof(T);
  const F zero = f_set(0.0f), one = f_set(1.0f), scaling = f_set(a.rule.scaling);
  const bool divides = a.rule.merge == Merge::kWeightedMean || a.rule.merge == Merge::kMean;
  const bool has_base = a.base.data != nullptr;
  for (unsigned g = 0; 16 * g < count; ++g) {
    F merged = f_load(s.numerator + 16 * g);
    if (divides) {
      const F divisor = f_load(s.denominator + 16 * g);
      merged = f_div(merged, f_select(f_eq(divisor, zero), one, divisor));
    }
    F result = f_mul(merged, scaling);
    if (has_base) result = f_add(f_load(s.base + 16 * g), result);
    const unsigned lanes = count - 16 * g < 16 ? count - 16 * g : 16;
    if (lanes == 16) {
      store16(reinterpret_cast<T*>(out + size_t(16) * g * sizeof(T)), result);
    } else {
      T padded[16];
      store16(padded, result);
      memcpy(out + size_t(16) * g * sizeof(T), padded, lanes * sizeof(T));
    }
  }
}

static bool general_loop(const GeneralArgs& a, uint64_t i, unsigned count, const GeneralScratch& s,
                         GeneralCounts& counts) {
  const unsigned groups = (count + 15) / 16;
  const bool elects = a.rule.elect != Elect::kNone;
  if (a.base.data != nullptr) {
    const Buffer none;
    deltas_loop(a.base, none, i, count, s.base);
  }
  F check = f_set(0.0f);
  uint64_t kept[64];
  for (int first = 0; first < a.count;
       first += 64) {  // counted only once the block is known to be finite
    for (int k = first; k < a.count && k < first + 64; ++k) {
      kept[k - first] = 0;
      with_type(a.models[k].type, [&](auto t) {
        trim_model<decltype(t)>(a, k, i, count, s, check, kept[k - first]);
      });
    }
    if (m_bits(f_lt(f_abs(check), f_set(INFINITY))) != 0xffffu) {
      for (int k = 0; k < first; ++k) {  // take back what earlier groups of models added
        const uint16_t* bits = s.keep + size_t(k) * (s.block / 16);
        for (unsigned g = 0; g < groups; ++g)
          counts.kept[k] -= uint64_t(__builtin_popcount(bits[g]));
      }
      return false;
    }
    for (int k = first; k < a.count && k < first + 64; ++k) counts.kept[k] += kept[k - first];
  }

  memset(s.sum, 0, groups * 64);
  memset(s.numerator, 0, groups * 64);
  memset(s.above, 0, groups * 2);
  memset(s.below, 0, groups * 2);
  float start = 0.0f;
  if (a.rule.merge == Merge::kWeightedMean && !elects) {
    start = std::fabs(a.rule.total_weight) < 1e-8f ? 1.0f : a.rule.total_weight;
  }
  for (unsigned j = 0; j < 16 * groups; ++j) s.denominator[j] = start;
  for (int k = 0; k < a.count; ++k) {
    if (a.rule.elect == Elect::kSum) {
      elect_model<Elect::kSum>(a, k, groups, s);
    } else if (a.rule.elect == Elect::kCount) {
      elect_model<Elect::kCount>(a, k, groups, s);
    } else {
      elect_model<Elect::kNone>(a, k, groups, s);
    }
  }
  for (unsigned g = 0; g < groups; ++g) {
    const unsigned conflict = unsigned(s.above[g] & s.below[g]);
    counts.conflicts += uint64_t(__builtin_popcount(conflict));
    if (!elects) continue;
    const F sum = f_load(s.sum + 16 * g);
    const unsigned up = m_bits(f_gt(sum, f_set(0.0f))), down = m_bits(f_lt(sum, f_set(0.0f)));
    counts.positive += uint64_t(__builtin_popcount(up));
    counts.negative += uint64_t(__builtin_popcount(down));
    counts.undecided +=
        uint64_t(__builtin_popcount(unsigned(s.above[g] | s.below[g]) & ~up & ~down));
    s.negative[g] = uint16_t(a.rule.zero_negative ? ~up : down);
  }
  for (int k = 0; k < a.count; ++k) {
    switch (a.rule.merge) {
      case Merge::kWeightedMean:
        merge_model<Merge::kWeightedMean>(a, k, groups, s);
        break;
      case Merge::kMean:
        merge_model<Merge::kMean>(a, k, groups, s);
        break;
      case Merge::kSum:
        merge_model<Merge::kSum>(a, k, groups, s);
        break;
      case Merge::kMax:
        merge_model<Merge::kMax>(a, k, groups, s);
        break;
    }
  }
  with_type(a.out_type, [&](auto t) { finish_block<decltype(t)>(a, i, count, s); });
  return true;
}

// --- T9 ------------------------------------------------------------------------------------------

static void norms_loop(const float* delta, const uint16_t* keep, unsigned count, bool squares,
                       double sums[2]) {
  double all[kRow] = {}, kept[kRow] = {};
  for (unsigned j = 0; j < count; j += kRow) {
    float row[kRow];
    for (unsigned g = 0; g < kRow / 16; ++g) {
      const F size = f_abs(f_load(delta + j + 16 * g));
      f_store(row + 16 * g, f_select(m_from(keep[j / 16 + g]), size, f_set(0.0f)));
    }
    if (squares) {
      for (unsigned l = 0; l < kRow; ++l) {
        const double x = double(std::fabs(delta[j + l])), y = double(row[l]);
        all[l] += x * x;
        kept[l] += y * y;
      }
    } else {
      for (unsigned l = 0; l < kRow; ++l) {
        all[l] += double(std::fabs(delta[j + l]));
        kept[l] += double(row[l]);
      }
    }
  }
  for (unsigned half = kRow / 2; half > 0; half /= 2) {
    for (unsigned l = 0; l < half; ++l) {
      all[l] += all[l + half];
      kept[l] += kept[l + half];
    }
  }
  sums[0] = all[0];
  sums[1] = kept[0];
}

// --- the copy that merges are measured against ---------------------------------------------------

// Four cache lines of every stream at a time: with one at a time the memory is slower.
static void copy_streams(const void* const* sources, int count, void* out, uint64_t bytes) {
  char* q = static_cast<char*>(out);
  const auto combined = [&](uint64_t at) {
    F x = f_load(static_cast<const char*>(sources[0]) + at);
    for (int k = 1; k < count; ++k) x = f_xor(x, f_load(static_cast<const char*>(sources[k]) + at));
    return x;
  };
  uint64_t j = 0;
  for (; j + 256 <= bytes; j += 256) {
    F x[4];
    for (int l = 0; l < 4; ++l) x[l] = f_load(static_cast<const char*>(sources[0]) + j + 64 * l);
    for (int k = 1; k < count; ++k) {
      const char* p = static_cast<const char*>(sources[k]) + j;
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) x[l] = f_xor(x[l], f_load(p + 64 * l));
    }
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) f_stream(q + j + 64 * l, x[l]);
  }
  for (; j + 64 <= bytes; j += 64) f_stream(q + j, combined(j));
}

static constexpr Kernels table(const char* name) {
  return {name,        keys_loop,         partition_loop,  count_loop,   count_units_loop,
          fused_table, fused_counts_loop, candidates_loop, collect_loop, general_loop,
          norms_loop,  deltas_loop,       copy_streams};
}
