// Loops over one block of elements, at most kBlock, in working precision binary32; included once
// per instruction set level by gram.cpp, behind the level's vector shim. d_add_product rounds once:
// the product of two binary32 numbers is exact in binary64, so a fused multiply-add gives the same
// bits.

// 16 elements from element i on.
template <DType type>
PYMERGE_INLINE F load16(const void* p) {
  if constexpr (type == DType::kFloat32) return f_load(p);
  if constexpr (type == DType::kFloat16) return f_load_half(p);
  return f_load_bf16(p);
}

// to[j] = x[i + j] in binary32, then 0 up to a multiple of 16.
template <DType type>
static void widen_as(const Buffer& x, uint64_t i, unsigned count, float* to) {
  constexpr uint64_t size = size_of(type);
  const char* from = static_cast<const char*>(x.data) + i * size;
  unsigned j = 0;
  for (; j + 16 <= count; j += 16) f_store(to + j, load16<type>(from + j * size));
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
    f_store(to + j, f_sub(load16<type>(from + j * size), f_load(base + j)));
  }
  if (j < count) {
    alignas(64) char padded[16 * size] = {};
    memcpy(padded, from + j * size, (count - j) * size);
    f_store(to + j, f_sub(load16<type>(padded), f_load(base + j)));
  }
}

// The task vectors of a block: from[k] points at them, in scratch[k] or in the model itself.
static void task_vectors(const Buffer* models, int count, const Buffer& base, uint64_t i,
                         unsigned elements, float (*scratch)[kBlock], float* held,
                         const float** from) {
  if (base.data != nullptr) widen_block(base, i, elements, held);
  for (int k = 0; k < count; ++k) {
    const Buffer& x = models[k];
    from[k] = scratch[k];
    if (base.data == nullptr) {
      if (x.type == DType::kFloat32 && elements % 16 == 0) {
        from[k] = reinterpret_cast<const float*>(x.at(i));
      } else {
        widen_block(x, i, elements, scratch[k]);
      }
    } else if (x.type == DType::kFloat32) {
      subtract_as<DType::kFloat32>(x, held, i, elements, scratch[k]);
    } else if (x.type == DType::kFloat16) {
      subtract_as<DType::kFloat16>(x, held, i, elements, scratch[k]);
    } else {
      subtract_as<DType::kBFloat16>(x, held, i, elements, scratch[k]);
    }
  }
}

// Adds the products of `count` models' pairs to their lanes, for models i .. i + K - 1 among
// themselves.
template <int K>
static void triangle(const float* const* from, int count, int i, unsigned groups, double* lanes) {
  D sums[K][K];
  for (int r = 0; r < K; ++r) {
    for (int c = r; c < K; ++c) sums[r][c] = d_load(lanes + 16 * pair_of(count, i + r, i + c));
  }
  for (unsigned g = 0; g < groups; ++g) {
    D x[K];
    for (int r = 0; r < K; ++r) x[r] = d_load_floats(from[i + r] + 16 * g);
    for (int r = 0; r < K; ++r) {
      for (int c = r; c < K; ++c) sums[r][c] = d_add_product(sums[r][c], x[r], x[c]);
    }
  }
  for (int r = 0; r < K; ++r) {
    for (int c = r; c < K; ++c) d_store(lanes + 16 * pair_of(count, i + r, i + c), sums[r][c]);
  }
}

// The same for models i .. i + R - 1 with j .. j + C - 1, all of them behind.
template <int R, int C>
static void rectangle(const float* const* from, int count, int i, int j, unsigned groups,
                      double* lanes) {
  D sums[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = d_load(lanes + 16 * pair_of(count, i + r, j + c));
  }
  for (unsigned g = 0; g < groups; ++g) {
    D left[R];
    for (int r = 0; r < R; ++r) left[r] = d_load_floats(from[i + r] + 16 * g);
    for (int c = 0; c < C; ++c) {
      const D right = d_load_floats(from[j + c] + 16 * g);
      for (int r = 0; r < R; ++r) sums[r][c] = d_add_product(sums[r][c], left[r], right);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) d_store(lanes + 16 * pair_of(count, i + r, j + c), sums[r][c]);
  }
}

// Models i .. i + size - 1, at most kSide of them, with all models from j on.
static void rectangles(const float* const* from, int count, int i, int size, int j, unsigned groups,
                       double* lanes) {
  for (; j < count; j += 2) {
    for (int r = 0; r < size; r += 2) {
      const bool two = r + 2 <= size, wide = j + 2 <= count;
      if (two && wide) {
        rectangle<2, 2>(from, count, i + r, j, groups, lanes);
      } else if (two) {
        rectangle<2, 1>(from, count, i + r, j, groups, lanes);
      } else if (wide) {
        rectangle<1, 2>(from, count, i + r, j, groups, lanes);
      } else {
        rectangle<1, 1>(from, count, i + r, j, groups, lanes);
      }
    }
  }
}

static void add_products(const float* const* from, int count, unsigned groups, double* lanes) {
  for (int i = 0; i < count; i += kSide) {
    const int size = count - i < kSide ? count - i : kSide;
    if (size == 1) triangle<1>(from, count, i, groups, lanes);
    if (size == 2) triangle<2>(from, count, i, groups, lanes);
    if constexpr (kSide > 2) {
      if (size == 3) triangle<3>(from, count, i, groups, lanes);
      if (size == 4) triangle<4>(from, count, i, groups, lanes);
      int j = i + size;
      for (; size == 4 && j + 2 <= count; j += 2) {
        rectangle<4, 2>(from, count, i, j, groups, lanes);
      }
      rectangles(from, count, i, size, j, groups, lanes);
    } else {
      rectangles(from, count, i, size, i + size, groups, lanes);
    }
  }
}

// G2: the products of a row's chunk, elements i .. i + elements - 1, to sums[pairs].
static void gram_chunk(const Buffer* models, int count, const Buffer& base, uint64_t i,
                       unsigned elements, Room& room, double* sums) {
  const int pairs = pairs_of(count);
  for (int p = 0; p < 16 * pairs; ++p) room.lanes[p] = 0;
  for (unsigned done = 0; done < elements; done += kBlock) {
    const unsigned now = elements - done < kBlock ? elements - done : kBlock;
    task_vectors(models, count, base, i + done, now, room.scratch, room.held, room.from);
    add_products(room.from, count, (now + 15) / 16, room.lanes);
  }
  for (int p = 0; p < pairs; ++p) sums[p] = tree(room.lanes + 16 * p);
}

// G3: adds the products of one row's columns, elements i .. i + elements - 1, to sums[pairs], which
// lie `stride` apart and have room for a multiple of 16.
static void gram_row_of_columns(const Buffer* models, int count, const Buffer& base, uint64_t i,
                                unsigned elements, Room& room, double* sums, uint64_t stride) {
  task_vectors(models, count, base, i, elements, room.scratch, room.held, room.from);
  for (int a = 0; a < count; ++a) {
    for (int b = a; b < count; ++b) {
      double* to = sums + pair_of(count, a, b) * stride;
      for (unsigned j = 0; j < elements; j += 16) {
        const D product = d_add_product(d_load(to + j), d_load_floats(room.from[a] + j),
                                        d_load_floats(room.from[b] + j));
        d_store(to + j, product);
      }
    }
  }
}

template <DType type, bool by_column>
static void add_scaled_as(const Buffer& x, const float* base, const float* by, uint64_t i,
                          unsigned count, float* sums) {
  constexpr uint64_t size = size_of(type);
  const char* from = static_cast<const char*>(x.data) + i * size;
  const F all = f_set(*by);
  unsigned j = 0;
  const auto add = [&](const void* p, const float* factors) __attribute__((always_inline)) {
    F value = load16<type>(p);
    if (base != nullptr) value = f_sub(value, f_load(base + j));
    const F factor = by_column ? f_load(factors) : all;
    f_store(sums + j, f_add(f_load(sums + j), f_mul(value, factor)));
  };
  for (; j + 16 <= count; j += 16) add(from + j * size, by + (by_column ? j : 0));
  if (j < count) {
    alignas(64) char padded[16 * size] = {};
    alignas(64) float factors[16] = {};
    memcpy(padded, from + j * size, (count - j) * size);
    if (by_column) memcpy(factors, by + j, (count - j) * sizeof(float));
    add(padded, factors);
  }
}

template <bool by_column>
static void add_scaled(const Buffer& x, const float* base, const float* by, uint64_t i,
                       unsigned count, float* sums) {
  switch (x.type) {
    case DType::kFloat32:
      return add_scaled_as<DType::kFloat32, by_column>(x, base, by, i, count, sums);
    case DType::kFloat16:
      return add_scaled_as<DType::kFloat16, by_column>(x, base, by, i, count, sums);
    default:
      return add_scaled_as<DType::kBFloat16, by_column>(x, base, by, i, count, sums);
  }
}

// T6: the cast. NaN becomes that of N2.
static void store_block(const float* sums, const float* base, void* out, DType type, uint64_t i,
                        unsigned count) {
  const F nan = f_set(bits_float(0x7fc00000u));
  char* to = static_cast<char*>(out) + i * size_of(type);
  for (unsigned j = 0; j < count; j += 16) {
    F value = f_load(sums + j);
    if (base != nullptr) value = f_add(f_load(base + j), value);
    value = f_select(f_eq(value, value), value, nan);
    alignas(64) char tail[64];
    void* p = j + 16 <= count ? to + j * size_of(type) : tail;
    if (type == DType::kFloat32) {
      f_store(p, value);
    } else if (type == DType::kFloat16) {
      f_store_half(p, value);
    } else {
      f_store_bf16(p, value);
    }
    if (p == tail) memcpy(to + j * size_of(type), tail, (count - j) * size_of(type));
  }
}

// G5 for elements i .. i + count - 1. by: of model k from by + k * stride on, one factor, or one
// for each element.
static void combine_block(const Buffer* models, int number, const Buffer& base, const float* by,
                          uint64_t stride, bool by_column, uint64_t i, unsigned count, void* out,
                          DType out_type, Room& room) {
  const float* held = nullptr;
  if (base.data != nullptr) {
    widen_block(base, i, count, room.held);
    held = room.held;
  }
  float* sums = room.scratch[0];
  for (unsigned j = 0; j < count; j += 16) f_store(sums + j, f_set(0));
  for (int k = 0; k < number; ++k) {
    if (by_column) {
      add_scaled<true>(models[k], held, by + k * stride, i, count, sums);
    } else {
      add_scaled<false>(models[k], held, by + k * stride, i, count, sums);
    }
  }
  store_block(sums, held, out, out_type, i, count);
}

static const Loops loops = {gram_chunk, gram_row_of_columns, combine_block};
