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

// What is ahead is nobody's object yet.
template <unsigned kBytes, int kCache>
PYMERGE_INLINE void prefetch(const char* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p) + kBytes;
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, kCache);
}

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
  // Where it is a long run, and not a place of a sample, the next one is read ahead.
  for (; count >= 512 && j + 64 <= count; j += 64) {
    for (unsigned at = 0; at < 64 * sizeof(X); at += 64) prefetch<4096, 2>(px + j * sizeof(X) + at);
    for (unsigned at = 0; at < 64 * sizeof(B); at += 64) prefetch<4096, 2>(pb + j * sizeof(B) + at);
#pragma GCC unroll 4
    for (unsigned v = 0; v < 64; v += 16) {
      body(f_sub(load16<X>(px + (j + v) * sizeof(X)), load16<B>(pb + (j + v) * sizeof(B))), j + v,
           16u);
    }
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

// --- T8 ------------------------------------------------------------------------------------------

// The words of the key in each round. In memory, from where vectors of one word are loaded: made
// from registers they take the port that shuffles do.
struct RoundKeys {
  explicit RoundKeys(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      first[round] = k0;
      second[round] = k1;
    }
  }
  uint32_t first[10], second[10];
};

// The words of 16 neighbouring groups, kPhiloxBlocks times: the first, second, third and fourth of
// each group. They are the low halves of 64-bit lanes, whatever is above them. False where the high
// word of the counter changes among the groups. Two rounds are half known, as groups differ in the
// low word of the counter alone.
PYMERGE_INLINE bool words_of(uint64_t group, uint32_t model, const RoundKeys& keys, W* c0, W* c1,
                             W* c2, W* c3) {
  constexpr int kBlocks = kPhiloxBlocks;
  if (uint32_t(group) > 0xffffffffu - 16 * kBlocks) return false;
  constexpr uint32_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u;
  const uint64_t model_product = uint64_t(kSecond) * model;
  const uint32_t word = uint32_t(model_product >> 32) ^ uint32_t(group >> 32) ^ keys.first[0];
  const uint64_t word_product = uint64_t(kFirst) * word;
  for (unsigned b = 0; b < kBlocks; ++b) {
    const W product = w_multiply(w_count(uint32_t(group) + 16 * b), kFirst);
    const W other = w_multiply(w_xor(w_high(product), w_set(0), keys.second[0]), kSecond);
    c0[b] = w_xor(w_high(other), w_set(uint32_t(model_product)), keys.first[1]);
    c1[b] = other;
    c2[b] = w_xor(product, w_set(uint32_t(word_product >> 32)), keys.second[1]);
    c3[b] = w_set(uint32_t(word_product));
  }
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
    for (unsigned b = 0; b < kBlocks; ++b) {
      const W product = w_multiply(c0[b], kFirst), other = w_multiply(c2[b], kSecond);
      c0[b] = w_xor(w_high(other), c1[b], keys.first[round]);
      c1[b] = other;
      c2[b] = w_xor(w_high(product), c3[b], keys.second[round]);
      c3[b] = product;
    }
  }
  return true;
}

// What T3 `random` keeps of their elements.
PYMERGE_INLINE void keep_bits_of(uint64_t group, uint32_t model, uint64_t key,
                                 const RoundKeys& keys, uint32_t cutoff, uint64_t* bits) {
  constexpr int kBlocks = kPhiloxBlocks;
  W c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  if (words_of(group, model, keys, c0, c1, c2, c3)) {
    for (unsigned b = 0; b < kBlocks; ++b) bits[b] = w_below(c0[b], c1[b], c2[b], c3[b], cutoff);
    return;
  }
  for (unsigned b = 0; b < kBlocks; ++b) {
    bits[b] = 0;
    for (unsigned j = 0; j < 64; ++j) {
      const uint32_t word = philox(group + 16 * b + j / 4, model, key).word[j % 4];
      bits[b] |= uint64_t(word < cutoff) << j;
    }
  }
}

static void words_loop(uint64_t i, uint64_t count, uint32_t model, uint64_t key, uint32_t* dst) {
  constexpr int kBlocks = kPhiloxBlocks;
  const RoundKeys keys(key);
  W c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  uint64_t j = 0;
  for (; j + 64 * kBlocks <= count; j += 64 * kBlocks) {
    if (!words_of((i + j) >> 2, model, keys, c0, c1, c2, c3)) break;
    for (unsigned b = 0; b < kBlocks; ++b)
      w_interleave(dst + j + 64 * b, c0[b], c1[b], c2[b], c3[b]);
  }
  for (; j < count; j += 4) {
    const PhiloxBlock four = philox((i + j) >> 2, model, key);
    memcpy(dst + j, four.word, sizeof(four.word));
  }
}

// What T3 `random` keeps of `count` elements of one model, whole words of 64; i is any.
static void random_bits(uint64_t i, unsigned count, uint32_t model, uint64_t key, uint64_t cutoff,
                        uint64_t* bits) {
  const unsigned words = (count + 63) / 64;
  if (cutoff >> 32 != 0) {
    for (unsigned w = 0; w < words; ++w) bits[w] = ~uint64_t(0);
    return;
  }
  const unsigned skip = unsigned(i & 3);
  uint64_t group = i >> 2;
  const RoundKeys keys(key);
  uint64_t drawn[kPhiloxBlocks];
  unsigned left = 0;  // of those that have been drawn
  const auto draw = [&] {
    if (left == 0) {
      keep_bits_of(group, model, key, keys, uint32_t(cutoff), drawn);
      group += 16 * kPhiloxBlocks;
      left = kPhiloxBlocks;
    }
    return drawn[kPhiloxBlocks - left--];
  };
  uint64_t here = draw();
  for (unsigned w = 0; w < words; ++w) {
    const uint64_t next = skip != 0 || w + 1 < words ? draw() : 0;
    bits[w] = skip == 0 ? here : here >> skip | next << (64 - skip);
    here = next;
  }
}

static void random_masks(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  for (int k = 0; k < a.count; ++k) {
    const FusedModel& model = a.models[k];
    uint64_t bits[kFusedBlock / 64];
    if (model.bits == nullptr) {
      random_bits(a.first + i, count, uint32_t(k), a.key, model.cutoff, bits);
    } else {
      const uint64_t* from = model.bits + i / 64;
      const unsigned shift = unsigned(i % 64);
      for (unsigned w = 0; w < count / 64; ++w)
        bits[w] = shift == 0 ? from[w] : from[w] >> shift | from[w + 1] << (64 - shift);
    }
    for (unsigned w = 0; w < count / 16; ++w)
      masks.keep[size_t(k) * masks.words + w] = uint16_t(bits[w / 4] >> (w % 4 * 16));
  }
}

// --- the fused loop ------------------------------------------------------------------------------

// So many vectors of every stream are taken at a time, and branches on what is to be done are taken
// once for them.
static_assert(kTile % (16 * kVectors) == 0 && kVectors % 2 == 0);

template <int kVectors, Types kTypes = Types::kAny>
PYMERGE_INLINE void load_step(const Buffer& buffer, uint64_t i, Types types, F* x) {
  if (kTypes == Types::kFloats || (kTypes == Types::kAny && buffer.type == DType::kFloat32)) {
    const char* p = static_cast<const char*>(buffer.data) + 4 * i;
    for (int v = 0; v < kVectors; ++v) prefetch<kAhead, kAheadCache>(p + 64 * v);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = f_load(p + 64 * v);
    return;
  }
  const char* p = static_cast<const char*>(buffer.data) + 2 * i;
  for (int v = 0; v < kVectors; v += 2) prefetch<512, 3>(p + 32 * v);
  if (kTypes == Types::kAny && buffer.type == DType::kFloat16) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = f_load_half(p + 32 * v);
  } else if (kTypes == Types::kPairs || (kVectors % 2 == 0 && types == Types::kPairs)) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; v += 2) {
      x[v] = f_load_even(p + 32 * v);
      x[v + 1] = f_load_odd(p + 32 * v);
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = f_load_bf16(p + 32 * v);
  }
}

// The cast of T6, for values that are finite or infinite.
template <int kVectors, Types kTypes>
PYMERGE_INLINE void store_step(const FusedArgs& a, uint64_t i, const F* x) {
  const bool floats =
      kTypes == Types::kFloats || (kTypes == Types::kAny && a.out_type == DType::kFloat32);
  char* p = static_cast<char*>(a.out) + (floats ? 4 : 2) * i;
  if (floats) {
    if (a.stream) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) f_stream(p + 64 * v, x[v]);
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) f_store(p + 64 * v, x[v]);
    }
  } else if (kTypes == Types::kPairs || a.types == Types::kPairs) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; v += 2) {
      a.stream ? f_stream_pairs(p + 32 * v, x[v], x[v + 1])
               : f_store_pairs(p + 32 * v, x[v], x[v + 1]);
    }
  } else {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; v += 2) {
      U narrow;  // 32 elements
      if (a.out_type == DType::kFloat16) {
        f_store_half(&narrow, x[v]);
        f_store_half(reinterpret_cast<char*>(&narrow) + 32, x[v + 1]);
      } else {
        f_store_bf16(&narrow, x[v]);
        f_store_bf16(reinterpret_cast<char*>(&narrow) + 32, x[v + 1]);
      }
      a.stream ? u_stream(p + 32 * v, narrow) : u_store(p + 32 * v, narrow);
    }
  }
}

// body(model) for all; where their number is a constant without a loop, so that what is kept of
// them can stay in registers.
template <int kModels, class Body>
PYMERGE_INLINE void each_model(int count, const Body& body) {
  static_assert(kModels <= 4);
  if constexpr (kModels == 0) {
    for (int k = 0; k < count; ++k) body(k);
  } else {
    body(0);
    if constexpr (kModels > 1) body(1);
    if constexpr (kModels > 2) body(2);
    if constexpr (kModels > 3) body(3);
  }
}

// T1 and T3 to T6. `s` says what of the rule may be done; where its members are constants, the loop
// has no branches on them. kEnds: it looks at the ends of bands by themselves.
//
// Trimmed values become zeros, which change no sum: partial sums start from +0 and never become -0.
// Where there is an election, a conflict is any value of the sign that was not elected: if S is not
// zero, or zero but not empty, there is one of the elected sign, too.
template <class S>
static bool fused_loop(const FusedArgs& args, uint64_t i, unsigned count, const FusedMasks& room,
                       const S s) {
  constexpr int kVectors = S::kTaken;
  constexpr unsigned kStep = 16 * kVectors;
  const FusedArgs a = args;
  const FusedMasks masks = room;
  const F zero = f_set(0.0f), one = f_set(1.0f), sign_bit = f_set(-0.0f);
  const U none = u_set(0);
  F check[kVectors];
  for (int v = 0; v < kVectors; ++v) check[v] = zero;
  for (unsigned j = 0; j < count; j += kStep) {
    const unsigned word = j / 16;
    F base[kVectors], sum[kVectors], divisor[kVectors], least[kVectors], most[kVectors];
    U kept_ones[kVectors], ones[kVectors];  // how many are kept, and agree
    if (a.base.data != nullptr) {
      load_step<kVectors, S::kTypes>(a.base, i + j, a.types, base);
    } else {
      for (int v = 0; v < kVectors; ++v) base[v] = sign_bit;  // x - (-0) is x, -0 + y is y
    }
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = least[v] = most[v] = zero;
      divisor[v] = f_set(a.denominator);
      kept_ones[v] = ones[v] = none;
    }
    F held[S::kModels == 0 ? 1 : S::kModels][kVectors];
    each_model<S::kModels>(a.count, [&](int k) __attribute__((always_inline)) {
      const FusedModel& model = a.models[k];
      F d[kVectors];
      M keep[kVectors];
      load_step<kVectors, S::kTypes>(model.x, i + j, a.types, d);
      for (int v = 0; v < kVectors; ++v) d[v] = f_sub(d[v], base[v]);  // T1
      uint16_t* kept = masks.keep + size_t(k) * masks.words + word;
      if (s.trim() == Trim::kRandom) {
        for (int v = 0; v < kVectors; ++v) keep[v] = m_from(kept[v]);
      } else {
        const F lower = f_set(model.lower);
        if constexpr (S::kEnds) {
          const F upper = f_set(model.upper);
          uint16_t* within = kept + size_t(a.count) * masks.words;
          for (int v = 0; v < kVectors; ++v) {
            const F size = f_abs(d[v]);
            const M from = f_ge(size, lower), to = f_le(size, upper);
            m_store(kept + v, from);
            m_store(within + v, to);
            keep[v] = m_and(from, to);
          }
        } else if (s.trim() == Trim::kOutliers) {
          const F upper = f_set(model.upper);
          for (int v = 0; v < kVectors; ++v) {
            const F size = f_abs(d[v]);
            keep[v] = m_and(f_ge(size, lower), f_le(size, upper));
          }
        } else {  // NaN passes, to be seen by `check`
          for (int v = 0; v < kVectors; ++v) keep[v] = f_nlt(f_abs(d[v]), lower);
        }
        if constexpr (!S::kEnds) {
          for (int v = 0; v < kVectors; ++v) m_store(kept + v, keep[v]);
        }
        if (s.no_zeros()) {
          for (int v = 0; v < kVectors; ++v) kept_ones[v] = u_add_one(keep[v], kept_ones[v]);
        }
      }
      if (s.compare() != Compare::kThreshold) {
        const F high = f_set(model.high);
        uint16_t* to = masks.high + size_t(k) * masks.words + word;
        for (int v = 0; v < kVectors; ++v) m_store(to + v, f_ge(f_abs(d[v]), high));
        if constexpr (S::kEnds) {
          const F upper_high = f_set(model.upper_high);
          to += size_t(a.count) * masks.words;
          for (int v = 0; v < kVectors; ++v) m_store(to + v, f_le(f_abs(d[v]), upper_high));
        }
      }
      if (s.compare() == Compare::kBracket) {
        const F low = f_set(model.low);
        uint16_t* to = masks.low + size_t(k) * masks.words + word;
        for (int v = 0; v < kVectors; ++v) m_store(to + v, f_ge(f_abs(d[v]), low));
        if constexpr (S::kEnds) {
          const F upper_low = f_set(model.upper_low);
          to += size_t(a.count) * masks.words;
          for (int v = 0; v < kVectors; ++v) m_store(to + v, f_le(f_abs(d[v]), upper_low));
        }
      }
      if (s.rescales()) {  // T3r
        const F by = f_set(model.rescale_by);
        if (model.rescale == Rescale::kDivide) {
          for (int v = 0; v < kVectors; ++v) d[v] = f_div(d[v], by);
        } else if (model.rescale == Rescale::kMultiply) {
          for (int v = 0; v < kVectors; ++v) d[v] = f_mul(d[v], by);
        }
      }
      if (s.sees()) {
        for (int v = 0; v < kVectors; ++v) check[v] = f_add_product(check[v], d[v], zero);
      }
      for (int v = 0; v < kVectors; ++v) d[v] = f_keep(keep[v], d[v]);
      F value[kVectors];
      if (s.votes() == Votes::kOnes) {
        for (int v = 0; v < kVectors; ++v) value[v] = d[v];
      } else {
        const F vote = f_set(model.vote);
        for (int v = 0; v < kVectors; ++v) value[v] = f_mul(d[v], vote);
      }
      if (s.elect() == Elect::kNone) {  // T5 at once: all that is kept takes part
        for (int v = 0; v < kVectors; ++v) {
          least[v] = f_min(least[v], value[v]);
          most[v] = f_max(most[v], value[v]);
        }
        F product[kVectors];
        if (s.unit() || s.votes() == Votes::kWeights) {
          for (int v = 0; v < kVectors; ++v) product[v] = s.unit() ? d[v] : value[v];
        } else {
          const F weight = f_set(model.weight);
          for (int v = 0; v < kVectors; ++v) product[v] = f_mul(d[v], weight);
        }
        if (s.merge() == Merge::kMax) {
          for (int v = 0; v < kVectors; ++v)
            sum[v] = f_select(f_gt(f_abs(product[v]), f_abs(sum[v])), product[v], sum[v]);
        } else {
          for (int v = 0; v < kVectors; ++v) sum[v] = f_add(sum[v], product[v]);
        }
        if (s.merge() == Merge::kMean) {
          for (int v = 0; v < kVectors; ++v) ones[v] = u_add_one(f_gt(f_abs(d[v]), zero), ones[v]);
        }
        return;
      }
      if constexpr (S::kModels == 0) {  // T4
        float* values = masks.values + size_t(k) * kStep;
        if (s.votes() == Votes::kWeights) {
          for (int v = 0; v < kVectors; ++v) f_store(values + 16 * v, value[v]);
        } else {
          for (int v = 0; v < kVectors; ++v) f_store(values + 16 * v, d[v]);
        }
      } else {
        for (int v = 0; v < kVectors; ++v) held[k][v] = value[v];
      }
      if (s.elect() == Elect::kSum) {
        for (int v = 0; v < kVectors; ++v) sum[v] = f_add(sum[v], value[v]);
      } else {
        for (int v = 0; v < kVectors; ++v) {
          sum[v] = f_add_kept(f_gt(value[v], zero), sum[v], one);
          sum[v] = f_sub(sum[v], f_keep(f_lt(value[v], zero), one));
        }
      }
    });

    F total[kVectors];
    if (s.elect() == Elect::kNone) {
      for (int v = 0; v < kVectors; ++v) {
        total[v] = sum[v];
        m_store(masks.conflict + word + v, m_and(f_lt(least[v], zero), f_gt(most[v], zero)));
      }
    } else {
      F elected[kVectors];  // the elected sign's bit
      if (s.majority()) {
        const M otherwise = m_from(a.zero_negative);
        for (int v = 0; v < kVectors; ++v) {
          m_store(masks.positive + word + v, f_gt(sum[v], zero));
          const M down = f_lt(sum[v], zero);
          m_store(masks.negative + word + v, down);
          elected[v] = f_keep(m_or(down, m_and(f_eq(sum[v], zero), otherwise)), sign_bit);
        }
      } else {  // S is never -0
        for (int v = 0; v < kVectors; ++v) elected[v] = f_and(sum[v], sign_bit);
      }
      for (int v = 0; v < kVectors; ++v) total[v] = zero;
      each_model<S::kModels>(a.count, [&](int k) __attribute__((always_inline)) {
        const FusedModel& model = a.models[k];
        F d[kVectors];
        M agree[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (S::kModels == 0) {
            d[v] = f_load(masks.values + size_t(k) * kStep + 16 * v);
          } else {
            d[v] = held[k][v];
          }
        }
        const auto vote_of = [&](F x) {
          return s.votes() == Votes::kOwn ? f_mul(x, f_set(model.vote)) : x;
        };
        for (int v = 0; v < kVectors; ++v) {
          const F flipped = f_xor(vote_of(d[v]), elected[v]);
          if (!s.no_zeros()) least[v] = f_min(least[v], flipped);
          agree[v] = f_gt(flipped, zero);
        }
        if (!s.unit() && s.votes() != Votes::kWeights) {
          const F weight = f_set(model.weight);
          for (int v = 0; v < kVectors; ++v) d[v] = f_mul(d[v], weight);
        }
        if (s.merge() == Merge::kMax) {
          for (int v = 0; v < kVectors; ++v) {
            const M more = f_gt_in(agree[v], f_abs(d[v]), f_abs(total[v]));
            total[v] = f_select(more, d[v], total[v]);
          }
        } else {
          for (int v = 0; v < kVectors; ++v) total[v] = f_add_kept(agree[v], total[v], d[v]);
        }
        if (s.counts()) {
          for (int v = 0; v < kVectors; ++v) ones[v] = u_add_one(agree[v], ones[v]);
        } else if (s.merge() == Merge::kWeightedMean) {
          const F weight = f_set(model.weight);
          for (int v = 0; v < kVectors; ++v) divisor[v] = f_add_kept(agree[v], divisor[v], weight);
        }
      });
      for (int v = 0; v < kVectors; ++v) {
        m_store(masks.conflict + word + v,
                s.no_zeros() ? u_fewer(ones[v], kept_ones[v]) : f_lt(least[v], zero));
      }
    }

    F merged[kVectors];  // T5
    if (s.merge() == Merge::kSum || s.merge() == Merge::kMax) {
      for (int v = 0; v < kVectors; ++v) merged[v] = total[v];
    } else if (S::kModels == 2 && s.counts()) {  // halving is exact division by 2
      const F half = f_set(0.5f);
      for (int v = 0; v < kVectors; ++v)
        merged[v] = f_select(u_fewer(u_set(1), ones[v]), f_mul(total[v], half), total[v]);
    } else if (s.counts() && a.count <= 5) {
      for (int v = 0; v < kVectors; ++v) merged[v] = f_divide_by_count(total[v], ones[v]);
    } else if (s.counts()) {
      for (int v = 0; v < kVectors; ++v)
        merged[v] = f_div(total[v], f_max(u_to_float(ones[v]), one));
    } else {
      for (int v = 0; v < kVectors; ++v)
        merged[v] = f_div(total[v], f_select(f_eq(divisor[v], zero), one, divisor[v]));
    }
    for (int v = 0; v < kVectors; ++v) check[v] = f_add_product(check[v], sum[v], merged[v]);
    if (a.scaling != 1.0f) {
      const F scaling = f_set(a.scaling);
      for (int v = 0; v < kVectors; ++v) merged[v] = f_mul(scaling, merged[v]);
    }
    for (int v = 0; v < kVectors; ++v) merged[v] = f_add(base[v], merged[v]);  // T6
    store_step<kVectors, S::kTypes>(a, i + j, merged);
  }
  // A kept NaN or infinity makes its sum not finite, an overflow of the merged value that one, and
  // either stays in `check`, as does the overflow of their product, which only costs time.
  unsigned finite = 0xffffu;
  for (int v = 0; v < kVectors; ++v) finite &= m_bits(f_lt(f_abs(check[v]), f_set(INFINITY)));
  return finite == 0xffffu;
}

// Any merge. Types and whether there is an election take a fifth of the time where they are asked
// in the loop; what the ends of bands take that are looked for is left out of the other loops.
template <Types kKnownTypes, bool kElects, bool kBands>
struct AnyShape {
  static constexpr int kTaken = kVectors;
  static constexpr Types kTypes = kKnownTypes;
  static constexpr bool kEnds = kBands;
  static constexpr int kModels = 0;
  const FusedArgs& a;
  bool seen;
  Trim trim() const { return kEnds ? Trim::kOutliers : a.trim; }
  Compare compare() const {
    return kEnds && a.compare != Compare::kBracket ? Compare::kHigh : a.compare;
  }
  Votes votes() const { return a.votes; }
  Elect elect() const { return kElects ? a.elect : Elect::kNone; }
  Merge merge() const { return a.merge; }
  bool unit() const { return a.unit; }
  bool rescales() const { return a.rescales; }
  bool majority() const { return a.majority; }
  bool sees() const { return seen; }
  // T5 divides by a number of models.
  bool counts() const {
    return a.merge == Merge::kMean ||
           (a.merge == Merge::kWeightedMean && a.unit && a.elect != Elect::kNone);
  }
  bool no_zeros() const { return false; }  // what is kept is not zero
};

// Means of models that all weigh 1, by the sign of their sum.
template <Compare kCompare, int kCount, Types kKnownTypes>
struct UnitShape {
  static constexpr int kTaken =
      kCount > 0 && kKnownTypes == Types::kFloats ? kHeldVectors : kVectors;
  static constexpr Types kTypes = kKnownTypes;
  static constexpr bool kEnds = false;
  static constexpr int kModels = kCount;
  static constexpr Trim trim() { return Trim::kMagnitude; }
  static constexpr Compare compare() { return kCompare; }
  static constexpr Votes votes() { return Votes::kOnes; }
  static constexpr Elect elect() { return Elect::kSum; }
  static constexpr Merge merge() { return Merge::kMean; }
  static constexpr bool unit() { return true; }
  static constexpr bool rescales() { return false; }
  static constexpr bool majority() { return false; }
  static constexpr bool sees() { return false; }
  static constexpr bool counts() { return true; }
  static constexpr bool no_zeros() { return true; }
};

// Sums of all that is kept.
template <Types kKnownTypes, Votes kVotes>
struct SumShape {
  static constexpr int kTaken = kKnownTypes == Types::kFloats ? kHeldVectors : kVectors;
  static constexpr Types kTypes = kKnownTypes;
  static constexpr bool kEnds = false;
  static constexpr int kModels = 0;
  static constexpr Trim trim() { return Trim::kMagnitude; }
  static constexpr Compare compare() { return Compare::kThreshold; }
  static constexpr Votes votes() { return kVotes; }
  static constexpr Elect elect() { return Elect::kNone; }
  static constexpr Merge merge() { return Merge::kSum; }
  static constexpr bool unit() { return kVotes == Votes::kOnes; }
  static constexpr bool rescales() { return false; }
  static constexpr bool majority() { return false; }
  static constexpr bool sees() { return false; }
  static constexpr bool counts() { return false; }
  static constexpr bool no_zeros() { return false; }
};

// Sums of all that bands keep.
template <Types kKnownTypes, Compare kCompare>
struct BandShape {
  static constexpr int kTaken = kVectors;
  static constexpr Types kTypes = kKnownTypes;
  static constexpr bool kEnds = kCompare != Compare::kThreshold;
  static constexpr int kModels = 0;
  const FusedArgs& a;
  static constexpr Trim trim() { return Trim::kOutliers; }
  static constexpr Compare compare() { return kCompare; }
  Votes votes() const { return a.votes; }
  static constexpr Elect elect() { return Elect::kNone; }
  static constexpr Merge merge() { return Merge::kSum; }
  bool unit() const { return a.unit; }
  static constexpr bool rescales() { return false; }
  static constexpr bool majority() { return false; }
  static constexpr bool sees() { return true; }
  static constexpr bool counts() { return false; }
  static constexpr bool no_zeros() { return false; }
};

template <Compare kCompare>
static bool band_loop(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  switch (a.types) {
    case Types::kFloats:
      return fused_loop(a, i, count, masks, BandShape<Types::kFloats, kCompare>{a});
    case Types::kPairs:
      return fused_loop(a, i, count, masks, BandShape<Types::kPairs, kCompare>{a});
    default:
      return fused_loop(a, i, count, masks, BandShape<Types::kAny, kCompare>{a});
  }
}

template <Votes kVotes>
static bool sum_loop(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  switch (a.types) {
    case Types::kFloats:
      return fused_loop(a, i, count, masks, SumShape<Types::kFloats, kVotes>());
    case Types::kPairs:
      return fused_loop(a, i, count, masks, SumShape<Types::kPairs, kVotes>());
    default:
      return fused_loop(a, i, count, masks, SumShape<Types::kAny, kVotes>());
  }
}

template <Compare kCompare, Types kTypes>
static bool unit_loop(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  if constexpr (kHeldModels >= 4) {
    switch (a.count) {
      case 2:
        return fused_loop(a, i, count, masks, UnitShape<kCompare, 2, kTypes>());
      case 3:
        return fused_loop(a, i, count, masks, UnitShape<kCompare, 3, kTypes>());
      case 4:
        return fused_loop(a, i, count, masks, UnitShape<kCompare, 4, kTypes>());
    }
  }
  return fused_loop(a, i, count, masks, UnitShape<kCompare, 0, kTypes>());
}

template <Compare kCompare>
static bool unit_loop(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  switch (a.types) {
    case Types::kFloats:
      return unit_loop<kCompare, Types::kFloats>(a, i, count, masks);
    case Types::kPairs:
      return unit_loop<kCompare, Types::kPairs>(a, i, count, masks);
    default:
      return unit_loop<kCompare, Types::kAny>(a, i, count, masks);
  }
}

template <bool kElects, bool kEnds>
static bool any_loop(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks,
                     bool seen) {
  switch (a.types) {
    case Types::kFloats:
      return fused_loop(a, i, count, masks, AnyShape<Types::kFloats, kElects, kEnds>{a, seen});
    case Types::kPairs:
      return fused_loop(a, i, count, masks, AnyShape<Types::kPairs, kElects, kEnds>{a, seen});
    default:
      return fused_loop(a, i, count, masks, AnyShape<Types::kAny, kElects, kEnds>{a, seen});
  }
}

static bool fused(const FusedArgs& a, uint64_t i, unsigned count, const FusedMasks& masks) {
  const bool thresholds = a.trim == Trim::kMagnitude || a.trim == Trim::kNone;
  const bool means = a.merge == Merge::kWeightedMean || a.merge == Merge::kMean;
  if (thresholds && means && a.unit && a.votes == Votes::kOnes && a.elect == Elect::kSum &&
      !a.rescales && !a.majority) {
    switch (a.compare) {
      case Compare::kThreshold:
        return unit_loop<Compare::kThreshold>(a, i, count, masks);
      case Compare::kHigh:
        return unit_loop<Compare::kHigh>(a, i, count, masks);
      case Compare::kBracket:
        return unit_loop<Compare::kBracket>(a, i, count, masks);
    }
  }
  if (thresholds && a.elect == Elect::kNone && a.merge == Merge::kSum && !a.rescales &&
      a.compare == Compare::kThreshold) {
    if (a.votes == Votes::kWeights) return sum_loop<Votes::kWeights>(a, i, count, masks);
    if (a.votes == Votes::kOnes && a.unit) return sum_loop<Votes::kOnes>(a, i, count, masks);
  }
  if (a.trim == Trim::kOutliers && a.elect == Elect::kNone && a.merge == Merge::kSum &&
      !a.rescales) {
    switch (a.compare) {
      case Compare::kThreshold:
        return band_loop<Compare::kThreshold>(a, i, count, masks);
      case Compare::kHigh:
        return band_loop<Compare::kHigh>(a, i, count, masks);
      case Compare::kBracket:
        return band_loop<Compare::kBracket>(a, i, count, masks);
    }
  }
  if (a.trim == Trim::kRandom) random_masks(a, i, count, masks);
  // The sum of what is kept shows what is not finite, unless it is none of the values, or not all
  // are kept that are not.
  const bool sums = a.elect == Elect::kSum || (a.elect == Elect::kNone && a.merge != Merge::kMax);
  const bool seen = !thresholds || !sums;
  const bool elects = a.elect != Elect::kNone;
  if (a.bounds() > a.count) {
    return elects ? any_loop<true, true>(a, i, count, masks, seen)
                  : any_loop<false, true>(a, i, count, masks, seen);
  }
  return elects ? any_loop<true, false>(a, i, count, masks, seen)
                : any_loop<false, false>(a, i, count, masks, seen);
}

PYMERGE_INLINE uint64_t word64(const uint16_t* words, unsigned j) {
  uint64_t bits;
  memcpy(&bits, words + 4 * j, 8);
  return bits;
}

PYMERGE_INLINE uint64_t ones_in(const uint16_t* words, unsigned count) {
#if defined(PYMERGE_VECTOR_POPCOUNT)
  if (has_vector_popcount && count % 32 == 0) return ones_in_lines(words, count / 32);
#endif
  uint64_t ones = 0;
  for (unsigned j = 0; j < count / 4; ++j) ones += uint64_t(__builtin_popcountll(word64(words, j)));
  return ones;
}

static void fused_counts(const FusedArgs& a, unsigned elements, const FusedMasks& masks,
                         FusedCounts& counts) {
  const unsigned words = elements / 16;
  for (int bound = 0; bound < a.bounds(); ++bound) {
    const size_t row = size_t(bound) * masks.words;
    counts.kept[bound] += ones_in(masks.keep + row, words);
    if (a.compare != Compare::kThreshold) counts.high[bound] += ones_in(masks.high + row, words);
  }
  counts.conflicts += ones_in(masks.conflict, words);
  if (a.elect == Elect::kNone || !a.majority) return;
  counts.positive += ones_in(masks.positive, words);
  counts.negative += ones_in(masks.negative, words);
  for (unsigned j = 0; j < words / 4; ++j) {
    counts.undecided += uint64_t(__builtin_popcountll(
        word64(masks.conflict, j) & ~word64(masks.positive, j) & ~word64(masks.negative, j)));
  }
}

// Which of the 64-bit words have a bit that is in `low` and not in `high`.
PYMERGE_INLINE uint32_t words_with(const uint16_t* low, const uint16_t* high, unsigned count) {
#if defined(PYMERGE_VECTOR_POPCOUNT)
  if (count == 32) return words_of_lines_with(low, high);
#endif
  uint32_t words = 0;
  for (unsigned j = 0; j < count; ++j)
    words |= uint32_t((word64(low, j) & ~word64(high, j)) != 0) << j;
  return words;
}

// Candidates are few, about one in 256 elements, and one or two in a 64-bit word that has any: two
// are written, and those that are there counted, without a branch on how many that is.
static void candidates_loop(const FusedArgs& a, const FusedMasks& masks, int bound,
                            unsigned elements, uint32_t first, Collected& list) {
  static_assert(kFusedBlock / 64 <= 32);
  const uint16_t* lows = masks.low + size_t(bound) * masks.words;
  const uint16_t* highs =
      (list.below_estimate ? masks.keep : masks.high) + size_t(bound) * masks.words;
  uint32_t words = words_with(lows, highs, elements / 64);
  uint32_t* pending = list.pending + list.pending_count;
  const bool pairs = a.types == Types::kPairs;
  const auto position = [pairs](unsigned bit) {
    return pairs ? (bit & 32u) + (bit & 15u) * 2 + (bit >> 4 & 1u) : bit;  // even ones first
  };
  for (; words != 0; words &= words - 1) {
    const unsigned j = unsigned(__builtin_ctz(words));
    const uint64_t bits = word64(lows, j) & ~word64(highs, j);
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

// A single one does not fill a vector, and its loads are from the L2 cache: without vectors, and
// without a branch on what it is.
static void collect_loop(const FusedArgs& a, int bound, Collected& list) {
  const unsigned count = list.pending_count;
  list.pending_count = 0;
  if (list.count + count > list.capacity) list.overflow = true;
  if (list.overflow) return;
  const auto value = [](const Buffer& x, uint32_t at) { return load<float>(x.type, x.data, at); };
  const bool upper = bound >= a.count;
  const Buffer& x = a.models[upper ? bound - a.count : bound].x;
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
  for (unsigned j = 0; j < count; ++j) {
    const uint32_t at = pending[j];
    const float base = a.base.data == nullptr ? -0.0f : value(a.base, at);
    const uint32_t size = key_of(value(x, at) - base), key = upper ? mirrored_key(size) : size;
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
    for (unsigned k = 0; k < models; ++k) record[1 + k] = float_bits(value(a.models[k].x, at));
    record[1 + models] = float_bits(a.base.data == nullptr ? -0.0f : value(a.base, at));
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

// --- T9 ------------------------------------------------------------------------------------------

// A row of 64 elements in order, or the first `count` of it and zeros.
PYMERGE_INLINE void load_row(const Buffer& buffer, uint64_t i, unsigned count, F* x) {
  if (count == kRow) {
    for (unsigned v = 0; v < kRow / 16; v += kVectors)
      load_step<kVectors>(buffer, i + 16 * v, Types::kAny, x + v);
    return;
  }
  char padded[kRow * 4] = {};
  memcpy(padded, buffer.at(i), count * size_of(buffer.type));
  for (unsigned v = 0; v < kRow / 16; v += kVectors)
    load_step<kVectors>({padded, buffer.type}, 16 * v, Types::kAny, x + v);
}

static void norms_loop(const FusedArgs& a, uint64_t i, unsigned count, Norms norm, uint64_t* drawn,
                       uint64_t stride, double* lanes, double* sums) {
  memset(lanes, 0, size_t(a.count) * 2 * kRow * sizeof(double));
  for (unsigned begin = 0; begin < count; begin += kFusedBlock) {
    const unsigned size = count - begin < kFusedBlock ? count - begin : kFusedBlock;
    for (int k = 0; k < a.count; ++k) {
      const FusedModel& model = a.models[k];
      uint64_t bits[kFusedBlock / 64];
      if (a.trim == Trim::kRandom && model.bits != nullptr) {
        memcpy(bits, model.bits + (i + begin) / 64, (size + 63) / 64 * 8);
      } else if (a.trim == Trim::kRandom) {
        random_bits(a.first + i + begin, size, uint32_t(k), a.key, model.cutoff, bits);
        if (drawn != nullptr)
          memcpy(drawn + size_t(k) * stride + (i + begin) / 64, bits, (size + 63) / 64 * 8);
      }
      double* all = lanes + size_t(k) * 2 * kRow;
      double* kept = all + kRow;
      D all_sums[kRow / 16], kept_sums[kRow / 16];
      U most[kRow / 16], kept_most[kRow / 16];  // as bits, of which those of NaN are the largest
      const unsigned vectors = kRow / 16;
      for (unsigned v = 0; v < vectors; ++v) {
        all_sums[v] = d_load(all + 16 * v);
        kept_sums[v] = d_load(kept + 16 * v);
        most[v] = u_load(all + 8 * v);
        kept_most[v] = u_load(kept + 8 * v);
      }
      const F lower = f_set(model.lower), upper = f_set(model.upper);
      for (unsigned j = 0; j < size; j += kRow) {
        F x[kRow / 16], base[kRow / 16];
        const unsigned here = size - j < kRow ? size - j : kRow;
        load_row(model.x, i + begin + j, here, x);
        if (a.base.data != nullptr) {
          load_row(a.base, i + begin + j, here, base);
          for (unsigned v = 0; v < vectors; ++v) x[v] = f_sub(x[v], base[v]);
        }
        const uint64_t word = a.trim == Trim::kRandom ? bits[j / 64] : 0;
#pragma GCC unroll 4
        for (unsigned v = 0; v < vectors; ++v) {
          const F magnitude = f_abs(x[v]);
          const M keep = a.trim == Trim::kRandom
                             ? m_from(unsigned(word >> (16 * v)) & 0xffffu)
                             : m_and(f_ge(magnitude, lower), f_le(magnitude, upper));
          if (norm == Norms::kSum) {
            all_sums[v] = d_add(all_sums[v], magnitude);
            kept_sums[v] = d_add_kept(keep, kept_sums[v], magnitude);
          } else if (norm == Norms::kSquares) {
            all_sums[v] = d_add_square(all_sums[v], magnitude);
            kept_sums[v] = d_add_square_kept(keep, kept_sums[v], magnitude);
          } else {
            most[v] = u_max(most[v], f_bits(magnitude));
            kept_most[v] = u_max(kept_most[v], f_bits(f_keep(keep, magnitude)));
          }
        }
      }
      for (unsigned v = 0; v < vectors; ++v) {
        if (norm == Norms::kLargest) {
          u_store(all + 8 * v, most[v]);
          u_store(kept + 8 * v, kept_most[v]);
        } else {
          d_store(all + 16 * v, all_sums[v]);
          d_store(kept + 16 * v, kept_sums[v]);
        }
      }
    }
  }
  for (int row = 0; row < 2 * a.count; ++row) {
    double* own = lanes + size_t(row) * kRow;
    if (norm == Norms::kLargest) {
      uint32_t largest = 0;
      for (unsigned l = 0; l < kRow; ++l) {
        const uint32_t bits = load_as<uint32_t>(own, l);
        largest = bits > largest ? bits : largest;
      }
      sums[row] = double(bits_float(largest));
      continue;
    }
    for (unsigned half = kRow / 2; half > 0; half /= 2) {
      for (unsigned l = 0; l < half; ++l) own[l] += own[l + half];
    }
    sums[row] = own[0];
  }
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
  return {name,       keys_loop,    partition_loop,  count_loop,   count_units_loop,
          fused,      fused_counts, candidates_loop, collect_loop, norms_loop,
          words_loop, copy_streams};
}
