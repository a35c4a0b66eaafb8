// Loops over one block of elements, at most kBlock, in working precision binary32; included once
// per instruction set level by gram.cpp, behind the level's vector shim. p_add_product may round
// once or twice: the product of two binary32 numbers is exact in binary64, so a fused multiply-add
// gives the same bits.

// 16 elements from element i on.
template <DType type>
PYMERGE_INLINE F load16(const void* p) {
  if constexpr (type == DType::kFloat32) return f_load(p);
  if constexpr (type == DType::kFloat16) return f_load_half(p);
  return f_load_bf16(p);
}

// The same place of the next block comes while products of this one are added up. It may be
// nobody's memory.
PYMERGE_INLINE void prefetch_next(const char* p, uint64_t size) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kBlock * size),
                     0, 2);
}

// to[j] = x[i + j] in binary32, then 0 up to a multiple of 16.
template <DType type>
static void widen_as(const Buffer& x, uint64_t i, unsigned count, float* to) {
  constexpr uint64_t size = size_of(type);
  const char* from = static_cast<const char*>(x.data) + i * size;
  unsigned j = 0;
  for (; j + 16 <= count; j += 16) {
    prefetch_next(from + j * size, size);
    f_store(to + j, load16<type>(from + j * size));
  }
  if (j < count) {
    alignas(64) char padded[16 * size] = {};
    memcpy(padded, from + j * size, (count - j) * size);
    f_store(to + j, load16<type>(padded));
  }
}

static void widen_block(const Buffer& x, uint64_t i, unsigned count, float* to) {
  switch (x.type) {
    case DType::kFloat32:
      return widen_as<DType::kFloat32>(x, i, count, to);
    case DType::kFloat16:
      return widen_as<DType::kFloat16>(x, i, count, to);
    default:
      return widen_as<DType::kBFloat16>(x, i, count, to);
  }
}

// T1: to[j] = x[i + j] - base[j], then 0.
template <DType type>
static void subtract_as(const Buffer& x, const float* base, uint64_t i, unsigned count, float* to) {
  constexpr uint64_t size = size_of(type);
  const char* from = static_cast<const char*>(x.data) + i * size;
  unsigned j = 0;
  for (; j + 16 <= count; j += 16) {
    prefetch_next(from + j * size, size);
    f_store(to + j, f_sub(load16<type>(from + j * size), f_load(base + j)));
  }
  if (j < count) {
    alignas(64) char padded[16 * size] = {};
    memcpy(padded, from + j * size, (count - j) * size);
    f_store(to + j, f_sub(load16<type>(padded), f_load(base + j)));
  }
}

// T1 for one model, whose base is in `held`, or null.
static void task_vector(const Buffer& x, const float* held, uint64_t i, unsigned elements,
                        float* to) {
  if (held == nullptr) return widen_block(x, i, elements, to);
  switch (x.type) {
    case DType::kFloat32:
      return subtract_as<DType::kFloat32>(x, held, i, elements, to);
    case DType::kFloat16:
      return subtract_as<DType::kFloat16>(x, held, i, elements, to);
    default:
      return subtract_as<DType::kBFloat16>(x, held, i, elements, to);
  }
}

// The base of a block in `held`, or null.
static const float* base_of(const Buffer& base, uint64_t i, unsigned elements, float* held) {
  if (base.data == nullptr) return nullptr;
  widen_block(base, i, elements, held);
  return held;
}

// Task vectors, and where their products are added: to 16 sums of every pair of `count` models,
// term t from elements at + t * step .. + 15 of each. The sums of one pair are `stride` behind the
// last's.
struct Terms {
  const float* const* from;
  int count;
  uint64_t at;
  unsigned terms;
  uint64_t step;
  double* sums;
  uint64_t stride;

  double* sums_of(int a, int b) const { return sums + stride * pair_of(count, a, b); }
};

// Models i .. i + K - 1 among themselves. A part of the 16 sums at a time, so that those of all
// pairs stay in registers and every element is widened once.
template <int K>
static void triangle(const Terms& t, int i) {
  const float* from[K];
  for (unsigned part = 0; part < 16; part += kPart) {
    P sums[K][K];
    for (int r = 0; r < K; ++r) {
      from[r] = t.from[i + r] + t.at + part;
      const double* own = t.sums_of(i + r, i + r) + part;
      for (int c = r; c < K; ++c) sums[r][c] = p_load(own + t.stride * (c - r));
    }
    for (unsigned term = 0; term < t.terms; ++term) {
      P x[K];
      for (int r = 0; r < K; ++r) {
        x[r] = p_widen(from[r]);
        from[r] += t.step;
      }
      for (int r = 0; r < K; ++r) {
        for (int c = r; c < K; ++c) sums[r][c] = p_add_product(sums[r][c], x[r], x[c]);
      }
    }
    for (int r = 0; r < K; ++r) {
      double* own = t.sums_of(i + r, i + r) + part;
      for (int c = r; c < K; ++c) p_store(own + t.stride * (c - r), sums[r][c]);
    }
  }
}

// Models i .. i + R - 1 with j .. j + C - 1, all of them behind.
template <int R, int C>
static void rectangle(const Terms& t, int i, int j) {
  const float *left[R], *right[C];
  for (unsigned part = 0; part < 16; part += kPart) {
    P sums[R][C];
    for (int r = 0; r < R; ++r) {
      left[r] = t.from[i + r] + t.at + part;
      const double* own = t.sums_of(i + r, j) + part;
      for (int c = 0; c < C; ++c) sums[r][c] = p_load(own + t.stride * c);
    }
    for (int c = 0; c < C; ++c) right[c] = t.from[j + c] + t.at + part;
    for (unsigned term = 0; term < t.terms; ++term) {
      P x[R];
      for (int r = 0; r < R; ++r) {
        x[r] = p_widen(left[r]);
        left[r] += t.step;
      }
      for (int c = 0; c < C; ++c) {
        const P y = p_widen(right[c]);
        right[c] += t.step;
        for (int r = 0; r < R; ++r) sums[r][c] = p_add_product(sums[r][c], x[r], y);
      }
    }
    for (int r = 0; r < R; ++r) {
      double* own = t.sums_of(i + r, j) + part;
      for (int c = 0; c < C; ++c) p_store(own + t.stride * c, sums[r][c]);
    }
  }
}

// Models i .. i + R - 1 with all models from j on.
template <int R>
static void rectangles(const Terms& t, int i, int j) {
  for (; j + 2 <= t.count; j += 2) rectangle<R, 2>(t, i, j);
  if (j < t.count) rectangle<R, 1>(t, i, j);
}

static void add_products(const Terms& t) {
  int i = 0;
  for (; i + 4 <= t.count; i += 4) {
    triangle<4>(t, i);
    rectangles<4>(t, i, i + 4);
  }
  if (t.count - i == 1) triangle<1>(t, i);
  if (t.count - i == 2) triangle<2>(t, i);
  if (t.count - i == 3) triangle<3>(t, i);
}

// G2: the products of a row's chunk, elements i .. i + elements - 1, to sums[pairs].
static void gram_chunk(const Buffer* models, int count, const Buffer& base, uint64_t i,
                       unsigned elements, Room& room, double* sums) {
  const int pairs = pairs_of(count);
  std::fill_n(room.lanes, 16 * pairs, 0.0);
  for (unsigned done = 0; done < elements; done += kBlock) {
    const unsigned now = elements - done < kBlock ? elements - done : kBlock;
    const float* held = base_of(base, i + done, now, room.held);
    for (int k = 0; k < count; ++k) {
      const bool direct = held == nullptr && models[k].type == DType::kFloat32 && now % 16 == 0;
      if (!direct) task_vector(models[k], held, i + done, now, room.scratch(k));
      room.from[k] =
          direct ? reinterpret_cast<const float*>(models[k].at(i + done)) : room.scratch(k);
    }
    add_products({room.from, count, 0, (now + 15) / 16, 16, room.lanes, 16});
  }
  for (int p = 0; p < pairs; ++p) sums[p] = tree(room.lanes + 16 * p);
}

// G3: adds the products of `rows` rows of `columns`, at most kRows, for their elements i ..
// i + elements - 1, at most kStrip, to sums[pairs], which lie kStrip apart.
static void gram_rows_of_columns(const Buffer* models, int count, const Buffer& base, uint64_t i,
                                 unsigned elements, unsigned rows, uint64_t columns, Room& room,
                                 double* sums) {
  for (unsigned row = 0; row < rows; ++row) {
    const float* held = base_of(base, i + row * columns, elements, room.held);
    for (int k = 0; k < count; ++k)
      task_vector(models[k], held, i + row * columns, elements, room.scratch(k) + row * kStrip);
  }
  for (int k = 0; k < count; ++k) room.from[k] = room.scratch(k);
  for (unsigned j = 0; j < elements; j += 16)
    add_products({room.from, count, j, rows, kStrip, sums + j, kStrip});
}

// to[j] = Σ_k fl(by_k * δ_k[i + j]), G5 before the cast, for models of one type; 0 behind `count`.
template <DType type, bool by_column>
static void sum_scaled_as(const Buffer* models, int number, const float* base, const float* by,
                          uint64_t stride, uint64_t i, unsigned count, float* to) {
  constexpr uint64_t size = size_of(type);
  // Four vectors at a time: with one at a time the memory is slower.
  unsigned j = 0;
  const auto sum = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    F sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = f_set(0);
    for (int k = 0; k < number; ++k) {
      const char* from = static_cast<const char*>(models[k].data) + (i + j) * size;
      const float* factors = by + k * stride;
      const F all = f_set(by_column ? 0.0f : *factors);
      for (int v = 0; v < kVectors; ++v) {
        prefetch_next(from + 16 * v * size, size);
        F value = load16<type>(from + 16 * v * size);
        if (base != nullptr) value = f_sub(value, f_load(base + j + 16 * v));
        const F factor = by_column ? f_load(factors + j + 16 * v) : all;
        sums[v] = f_add(sums[v], f_mul(value, factor));
      }
    }
    for (int v = 0; v < kVectors; ++v) f_store(to + j + 16 * v, sums[v]);
    j += 16 * kVectors;
  };
  while (j + 64 <= count) sum(std::integral_constant<int, 4>());
  while (j + 16 <= count) sum(std::integral_constant<int, 1>());
  if (j == count) return;
  F sums = f_set(0);
  for (int k = 0; k < number; ++k) {
    alignas(64) char padded[16 * size] = {};
    alignas(64) float factors[16];
    memcpy(padded, static_cast<const char*>(models[k].data) + (i + j) * size, (count - j) * size);
    std::fill_n(factors, 16, by[k * stride]);
    if (by_column) memcpy(factors, by + k * stride + j, (count - j) * sizeof(float));
    F value = load16<type>(padded);
    if (base != nullptr) value = f_sub(value, f_load(base + j));
    sums = f_add(sums, f_mul(value, f_load(factors)));
  }
  f_store(to + j, sums);
}

template <bool by_column>
static void sum_scaled(const Buffer* models, int number, const float* base, const float* by,
                       uint64_t stride, uint64_t i, unsigned count, Room& room, float* to) {
  bool alike = true;
  for (int k = 1; k < number; ++k) alike &= models[k].type == models[0].type;
  const DType type = alike && number > 0 ? models[0].type : DType::kFloat32;
  if (alike && type == DType::kFloat32)
    return sum_scaled_as<DType::kFloat32, by_column>(models, number, base, by, stride, i, count,
                                                     to);
  if (type == DType::kFloat16)
    return sum_scaled_as<DType::kFloat16, by_column>(models, number, base, by, stride, i, count,
                                                     to);
  if (type == DType::kBFloat16)
    return sum_scaled_as<DType::kBFloat16, by_column>(models, number, base, by, stride, i, count,
                                                      to);
  for (int k = 0; k < number; ++k) {
    widen_block(models[k], i, count, room.scratch(k + 1));
    room.wide[k] = {room.scratch(k + 1), DType::kFloat32};
  }
  sum_scaled_as<DType::kFloat32, by_column>(room.wide, number, base, by, stride, 0, count, to);
}

// T6: the cast. NaN becomes that of N2. stream: without the caches, for an output at a multiple of
// 64 bytes.
static void store_block(const float* sums, const float* base, void* out, DType type, uint64_t i,
                        unsigned count, bool stream) {
  const F nan = f_set(bits_float(0x7fc00000u));
  char* to = static_cast<char*>(out) + i * size_of(type);
  const auto merged = [&](unsigned j) __attribute__((always_inline)) {
    F value = f_load(sums + j);
    if (base != nullptr) value = f_add(f_load(base + j), value);
    return f_select(f_eq(value, value), value, nan);
  };
  const auto put_16_bits = [&](void* p, F value) __attribute__((always_inline)) {
    type == DType::kFloat16 ? f_store_half(p, value) : f_store_bf16(p, value);
  };
  const auto put = [&](void* p, F value) __attribute__((always_inline)) {
    if (type != DType::kFloat32) {
      put_16_bits(p, value);
    } else {
      stream ? f_stream(p, value) : f_store(p, value);
    }
  };
  unsigned j = 0;
  if (stream && size_of(type) == 2) {
    for (; j + 32 <= count; j += 32) {
      alignas(64) char narrow[64];
      put_16_bits(narrow, merged(j));
      put_16_bits(narrow + 32, merged(j + 16));
      f_stream(to + 2 * j, f_load(reinterpret_cast<const float*>(narrow)));
    }
  }
  for (; j + 16 <= count; j += 16) put(to + j * size_of(type), merged(j));
  if (j == count) return;
  alignas(64) char tail[64];
  put(tail, merged(j));
  memcpy(to + j * size_of(type), tail, (count - j) * size_of(type));
}

// G5 for elements i .. i + count - 1. by: of model k from by + k * stride on, one factor, or one
// for each element.
static void combine_block(const Buffer* models, int number, const Buffer& base, const float* by,
                          uint64_t stride, bool by_column, uint64_t i, unsigned count, void* out,
                          DType out_type, bool stream, Room& room) {
  const float* held = base_of(base, i, count, room.held);
  float* sums = room.scratch(0);
  if (by_column) {
    sum_scaled<true>(models, number, held, by, stride, i, count, room, sums);
  } else {
    sum_scaled<false>(models, number, held, by, stride, i, count, room, sums);
  }
  stream &= reinterpret_cast<uintptr_t>(out) % 64 == 0 && i * size_of(out_type) % 64 == 0;
  store_block(sums, held, out, out_type, i, count, stream);
}

static const Loops loops = {gram_chunk, gram_rows_of_columns, combine_block};
