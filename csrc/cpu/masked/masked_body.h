// Loops over blocks of elements, included once per instruction set by masked.cpp. Each is a sweep
// over arrays that stay in the L1 cache, without branches, so that the compiler's vectors take it:
// of `c ? x : 0` GCC 12 makes a branch in most of them, which `pick` keeps it from.

template <class Work>
inline Work pick(bool condition, Work yes, Work no) {
  const Key<Work> mask = Key<Work>(0) - Key<Work>(condition);
  return bit_cast<Work>((bit_cast<Key<Work>>(yes) & mask) | (bit_cast<Key<Work>>(no) & ~mask));
}
template <class Work>
inline Work keep(bool condition, Work x) {
  return bit_cast<Work>(bit_cast<Key<Work>>(x) & (Key<Work>(0) - Key<Work>(condition)));
}

// --- elements to and from the working precision
// ---------------------------------------------------

// As to_float of common/dtype.h, without branches: the exponent is moved by a multiplication, exact
// also for subnormal numbers.
inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
  const uint32_t moved = float_bits(bits_float(magnitude) * 5.192296858534828e33f);  // 2^112
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(uint32_t(bits & 0x8000u) << 16 | moved | special);
}

template <class Work>
void widen_block(const Buffer& from, uint64_t i, uint64_t count, Work* to) {
  const char* data = static_cast<const char*>(from.at(i));
  // The stretch of this block is too short for the processor to see where it leads: what comes two
  // blocks on, which is nobody's object yet.
  const uint64_t bytes = kBlock * size_of(from.type);
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(data) + 2 * bytes;
  for (uint64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + at), 0, 2);
  uint16_t narrow[kBlock];
  switch (from.type) {
    case DType::kFloat32: {
      if constexpr (std::is_same_v<Work, float>) {
        std::memcpy(to, data, count * sizeof(float));
      } else {
        float same[kBlock];
        std::memcpy(same, data, count * sizeof(float));
        for (uint64_t j = 0; j < count; ++j) to[j] = Work(same[j]);
      }
      return;
    }
    case DType::kBFloat16:
      std::memcpy(narrow, data, count * sizeof(uint16_t));
      for (uint64_t j = 0; j < count; ++j) to[j] = Work(bits_float(uint32_t(narrow[j]) << 16));
      return;
    case DType::kFloat16:
      std::memcpy(narrow, data, count * sizeof(uint16_t));
      for (uint64_t j = 0; j < count; ++j) to[j] = Work(half_to_float(narrow[j]));
      return;
    default: {
      double same[kBlock];
      std::memcpy(same, data, count * sizeof(double));
      for (uint64_t j = 0; j < count; ++j) to[j] = Work(same[j]);
    }
  }
}

template <class Work>
void store_block(const Work* from, DType type, void* out, uint64_t i, uint64_t count) {
  for (uint64_t j = 0; j < count; ++j) store<Work>(type, out, i + j, from[j]);
}
inline void store_block(const float* from, DType type, void* out, uint64_t i, uint64_t count) {
  if (type == DType::kFloat32) {
    float same[kBlock];
    for (uint64_t j = 0; j < count; ++j) same[j] = Cast<float>::from(from[j]);
    std::memcpy(static_cast<char*>(out) + i * sizeof(float), same, count * sizeof(float));
  } else if (type == DType::kBFloat16) {
    uint16_t narrow[kBlock];
    for (uint64_t j = 0; j < count; ++j) narrow[j] = to_bfloat16(from[j]).bits;
    std::memcpy(static_cast<char*>(out) + i * sizeof(uint16_t), narrow, count * sizeof(uint16_t));
  } else {
    for (uint64_t j = 0; j < count; ++j) store<float>(type, out, i + j, from[j]);
  }
}

// --- a block of task vectors
// -----------------------------------------------------------------------

template <class Work>
struct Block {
  explicit Block(size_t models) : deltas(models * kBlock) {}

  std::vector<Work> deltas;  // [models][kBlock]; 0 in void elements
  Work base[kBlock];
  Work poison[kBlock];     // P1: NaN in void elements, else 0
  Work first[kBlock];      // the first model
  Work keys[kBlock] = {};  // P2, where asked for
  bool any_void;

  const Work* delta(size_t k) const { return deltas.data() + k * kBlock; }

  void read(const MaskedInputs& in, uint64_t i, uint64_t count, uint64_t* non_finite) {
    widen_block(in.base, i, count, base);
    for (uint64_t j = 0; j < count; ++j) poison[j] = 0;
    for (size_t k = 0; k < in.models.size(); ++k) {
      Work* own = deltas.data() + k * kBlock;
      widen_block(in.models[k], i, count, own);
      if (k == 0) std::copy(own, own + count, first);
      for (uint64_t j = 0; j < count; ++j) {
        own[j] = own[j] - base[j];
        poison[j] += own[j] * 0;
      }
    }
    Key<Work> seen = 0;
    for (uint64_t j = 0; j < count; ++j) seen |= absolute_bits(poison[j]);
    any_void = seen != 0;
    if (any_void) clear(count, non_finite);
  }

 private:
  void clear(uint64_t count, uint64_t* non_finite) {
    for (size_t k = 0; k < deltas.size() / kBlock; ++k) {
      Work* own = deltas.data() + k * kBlock;
      for (uint64_t j = 0; j < count; ++j) {
        if (non_finite != nullptr) non_finite[k] += !is_finite(own[j]);
        if (is_nan(poison[j])) own[j] = 0;
      }
    }
  }
};

// P2, variance: in binary64 about the first model, so that equal task vectors have exactly 0.
template <class Work>
void variances(Block<Work>& block, size_t models, uint64_t count) {
  double mean[kBlock] = {}, sum[kBlock] = {};
  const Work* origin = block.delta(0);
  for (size_t k = 1; k < models; ++k) {
    const Work* own = block.delta(k);
    for (uint64_t j = 0; j < count; ++j) mean[j] += double(own[j]) - double(origin[j]);
  }
  const double divisor = double(models);
  for (uint64_t j = 0; j < count; ++j) mean[j] /= divisor;
  for (size_t k = 0; k < models; ++k) {
    const Work* own = block.delta(k);
    for (uint64_t j = 0; j < count; ++j) {
      const double away = (double(own[j]) - double(origin[j])) - mean[j];
      sum[j] += away * away;
    }
  }
  for (uint64_t j = 0; j < count; ++j) block.keys[j] = Work(sum[j] / divisor);
}

// Keys that compare with `bound` as the variances do. In binary32 they are computed in binary32, at
// half the cost: with u = 2^-24 and Y the largest |y_k|, y_k - m is off by at most (K + 4) u Y, and
// as the sum of squares is at least Y^2 / 2, the variance by (3 sqrt(K) (K + 4) + K + 3) u of
// itself. A block with a key that is within four times that of the bound is computed as the spec
// says.
template <class Work>
void variances_near(Block<Work>& block, size_t models, uint64_t count, Work bound) {
  if constexpr (std::is_same_v<Work, float>) {
    const float k_models = float(models);
    const float band = 4 * (3 * std::sqrt(k_models) * (k_models + 4) + k_models + 3) *
                       5.9604644775390625e-8f * bound;
    if (bound > 1e-30f && bound < 1e30f) {
      float mean[kBlock] = {}, sum[kBlock] = {};
      const float* origin = block.delta(0);
      for (size_t k = 1; k < models; ++k) {
        const float* own = block.delta(k);
        for (uint64_t j = 0; j < count; ++j) mean[j] += own[j] - origin[j];
      }
      for (uint64_t j = 0; j < count; ++j) mean[j] /= k_models;
      for (size_t k = 0; k < models; ++k) {
        const float* own = block.delta(k);
        for (uint64_t j = 0; j < count; ++j) {
          const float away = (own[j] - origin[j]) - mean[j];
          sum[j] += away * away;
        }
      }
      uint32_t close = 0;
      for (uint64_t j = 0; j < count; ++j) {
        block.keys[j] = sum[j] / k_models;
        close |= uint32_t(!(std::fabs(block.keys[j] - bound) > band));
      }
      if (close == 0) return;
    }
  }
  variances(block, models, count);
}

// How many variances are above 0. In binary32, where squares of differences from 1e-15 on do not
// vanish, those of elements that differ at all.
template <class Work>
uint64_t nonzero_variances(Block<Work>& block, size_t models, uint64_t count) {
  if constexpr (std::is_same_v<Work, float>) {
    uint32_t differ[kBlock] = {}, found = 0, small = 0;
    const float* origin = block.delta(0);
    for (size_t k = 1; k < models; ++k) {
      const float* own = block.delta(k);
      for (uint64_t j = 0; j < count; ++j) {
        const float away = std::fabs(own[j] - origin[j]);
        const uint32_t differs = uint32_t(away > 0);
        differ[j] |= differs;
        small |= differs & uint32_t(away < 1e-15f);
      }
    }
    for (uint64_t j = 0; j < count; ++j) found += differ[j];
    if (small == 0) return found;
  }
  variances(block, models, count);
  uint64_t found = 0;
  for (uint64_t j = 0; j < count; ++j) found += block.keys[j] > 0;
  return found;
}

// P2, importance: of the one model, signed.
template <class Work>
void importances(Block<Work>& block, const MaskedKey& key, uint64_t i, uint64_t count) {
  const Work* own = block.delta(0);
  for (uint64_t j = 0; j < count;) {
    const uint64_t row = (i + j) / key.row;
    const uint64_t end = std::min(count, (row + 1) * key.row - i);
    const Work by = load<Work>(key.divergences.type, key.divergences.data, row);
    for (; j < end; ++j) block.keys[j] = std::fabs(own[j]) * by;
  }
}

template <class Work>
void compute_keys(Block<Work>& block, const MaskedInputs& in, const MaskedKey& key, uint64_t i,
                  uint64_t count) {
  if (key.kind == MaskedKey::Kind::kVariance) return variances(block, in.models.size(), count);
  importances(block, key, i, count);
}

template <class Work>
void keys_of(const MaskedInputs& in, const MaskedKey& key, uint64_t begin, uint64_t count,
             Key<Work>* dst) {
  thread_local Block<Work> block(0);
  block.deltas.resize(in.models.size() * kBlock);
  for (uint64_t i = begin; i < begin + count; i += kBlock) {
    const uint64_t some = std::min<uint64_t>(kBlock, begin + count - i);
    block.read(in, i, some, nullptr);
    compute_keys(block, in, key, i, some);
    Key<Work>* to = dst + (i - begin);
    const Work sign = key.kind == MaskedKey::Kind::kNegativeImportance ? Work(-1) : Work(1);
    for (uint64_t j = 0; j < some; ++j) {
      const Work value = block.keys[j] * sign;
      to[j] = bit_cast<Key<Work>>(keep(value > 0, value));
    }
  }
}

template <class Work>
uint64_t nonzero(const MaskedInputs& in, const MaskedKey& key, uint64_t begin, uint64_t end) {
  Key<Work> keys[kBlock + 16];
  uint64_t found = 0;
  Block<Work> block(in.models.size());
  for (uint64_t i = begin; i < end; i += kBlock) {
    const uint64_t count = std::min<uint64_t>(kBlock, end - i);
    if (key.kind == MaskedKey::Kind::kVariance) {
      block.read(in, i, count, nullptr);
      found += nonzero_variances(block, in.models.size(), count);
      continue;
    }
    keys_of<Work>(in, key, i, count, keys);
    Key<Work> above = 0;
    for (uint64_t j = 0; j < count; ++j) above += keys[j] != 0;
    found += above;
  }
  return found;
}

// P6: sums[k] of one chunk.
template <class Work>
void energies(const MaskedInputs& in, const MaskedRule& rule, uint64_t begin, uint64_t end,
              double* sums) {
  const size_t models = in.models.size();
  Block<Work> block(models);
  std::vector<double> lanes(models * kLanes);
  const Work bound = Work(rule.bound);
  for (uint64_t i = begin; i < end; i += kBlock) {
    const uint64_t count = std::min<uint64_t>(kBlock, end - i);
    block.read(in, i, count, nullptr);
    if (!rule.whole) variances_near(block, models, count, bound);
    for (size_t k = 0; k < models; ++k) {
      double squares[kBlock] = {};
      const Work* own = block.delta(k);
      for (uint64_t j = 0; j < count; ++j) squares[j] = double(own[j]) * double(own[j]);
      if (!rule.whole) {
        for (uint64_t j = 0; j < count; ++j) squares[j] = keep(block.keys[j] >= bound, squares[j]);
      }
      double* lane = lanes.data() + k * kLanes;
      for (uint64_t row = 0; row < kBlock; row += kLanes) {
        for (uint64_t l = 0; l < kLanes; ++l) lane[l] += squares[row + l];
      }
    }
  }
  for (size_t k = 0; k < models; ++k) {
    double* lane = lanes.data() + k * kLanes;
    for (uint64_t half = kLanes / 2; half > 0; half /= 2) {
      for (uint64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
    }
    sums[k] = lane[0];
  }
}

// P5: how many models have each element of a block.
template <class Work>
void contributions(const Block<Work>& block, size_t models, uint64_t count, Work epsilon,
                   Work* contributing) {
  for (uint64_t j = 0; j < count; ++j) contributing[j] = 0;
  for (size_t k = 0; k < models; ++k) {
    const Work* own = block.delta(k);
    for (uint64_t j = 0; j < count; ++j) {
      contributing[j] += keep(std::fabs(own[j]) > epsilon, Work(1));
    }
  }
}

template <class Work>
void overlaps(const MaskedInputs& in, double epsilon_given, uint64_t begin, uint64_t end,
              uint64_t* shared, uint64_t* alone) {
  const size_t models = in.models.size();
  const Work epsilon = Work(epsilon_given);
  Block<Work> block(models);
  Work contributing[kBlock];
  for (uint64_t i = begin; i < end; i += kBlock) {
    const uint64_t count = std::min<uint64_t>(kBlock, end - i);
    block.read(in, i, count, nullptr);
    contributions(block, models, count, epsilon, contributing);
    for (size_t k = 0; k < models; ++k) {
      const Work* own = block.delta(k);
      Key<Work> together = 0, single = 0;
      for (uint64_t j = 0; j < count; ++j) {
        const bool has = std::fabs(own[j]) > epsilon;
        together += has & (contributing[j] > 1);
        single += has & (contributing[j] == 1);
      }
      shared[k] += together;
      alone[k] += single;
    }
  }
}

// --- the merge
// -------------------------------------------------------------------------------------

template <class Work>
struct Merger {
  const MaskedInputs& in;
  const MaskedRule& rule;
  MaskedStats& stats;
  Block<Work> block;
  std::vector<Work> factors;
  Work bound;
  Work merged[kBlock];

  Merger(const MaskedInputs& inputs, const MaskedRule& its, MaskedStats& counts)
      : in(inputs), rule(its), stats(counts), block(inputs.models.size()), bound(Work(its.bound)) {
    for (const double factor : its.factors) factors.push_back(Work(factor));
  }

  void run(uint64_t i, uint64_t count, void* out, DType out_type) {
    block.read(in, i, count, stats.non_finite.data());
    switch (rule.merge) {
      case MaskedRule::Merge::kNear:
        near(count);
        break;
      case MaskedRule::Merge::kOverlap:
        overlap(count);
        break;
      case MaskedRule::Merge::kConsensus:
        consensus(count);
        break;
      default:
        important(i, count);
    }
    if (block.any_void) {
      for (uint64_t j = 0; j < count; ++j) {
        if (is_nan(block.poison[j])) merged[j] = block.poison[j];
      }
    }
    store_block(merged, out_type, out, i, count);
  }

  void near(uint64_t count) {  // P4
    const Work* own = block.delta(0);
    Key<Work> kept = 0;
    for (uint64_t j = 0; j < count; ++j) {
      const Work away = std::fabs(own[j]);
      const Work quotient = bound / pick(away > Work(1e-6), away, Work(1e-6));
      const Work positive = keep(quotient > 0, quotient);
      const Work weight = pick(positive < 1, positive, Work(1));
      merged[j] = weight * block.first[j] + (1 - weight) * block.base[j];
      kept += weight > 0;
    }
    stats.kept[0] += kept;
  }

  void overlap(uint64_t count) {  // P5
    Work contributing[kBlock], total[kBlock] = {}, scaled[kBlock] = {};
    contributions(block, in.models.size(), count, bound, contributing);
    for (size_t k = 0; k < in.models.size(); ++k) {
      const Work* own = block.delta(k);
      const Work factor = factors[k];
      Key<Work> kept = 0;
      for (uint64_t j = 0; j < count; ++j) {
        const bool has = std::fabs(own[j]) > bound;
        total[j] += keep(has, own[j]);
        scaled[j] += keep(has, own[j] * factor);
        kept += has;
      }
      stats.kept[k] += kept;
    }
    for (uint64_t j = 0; j < count; ++j) {
      const Work mean = total[j] / pick(contributing[j] > 1, contributing[j], Work(1));
      merged[j] = block.base[j] + pick(contributing[j] == 1, scaled[j], mean);
    }
  }

  void consensus(uint64_t count) {  // P6
    const size_t models = in.models.size();
    Work sum[kBlock] = {}, total[kBlock] = {}, divisor[kBlock] = {};
    Key<Work> up[kBlock] = {}, down[kBlock] = {}, selected[kBlock];
    if (!rule.whole) variances_near(block, models, count, bound);
    for (uint64_t j = 0; j < count; ++j) {
      selected[j] = Key<Work>(block.keys[j] >= bound);
    }
    if (rule.whole) std::fill(selected, selected + count, Key<Work>(1));
    for (size_t k = 0; k < models; ++k) {
      const Work* own = block.delta(k);
      for (uint64_t j = 0; j < count; ++j) {
        sum[j] += own[j];
        up[j] |= Key<Work>(own[j] > 0);
        down[j] |= Key<Work>(own[j] < 0);
      }
    }
    Key<Work> conflicts = 0;
    for (uint64_t j = 0; j < count; ++j) conflicts += up[j] & down[j] & selected[j];
    stats.conflicts += conflicts;
    for (size_t k = 0; k < models; ++k) {
      const Work* own = block.delta(k);
      const Work weight = factors[k];
      Key<Work> kept = 0;
      for (uint64_t j = 0; j < count; ++j) {
        const bool agrees = pick(sum[j] >= 0, own[j], -own[j]) > 0;  // T4
        total[j] += keep(agrees, own[j] * weight);
        divisor[j] += keep(agrees, weight);
        kept += Key<Work>(agrees) & selected[j];
      }
      stats.kept[k] += kept;
    }
    const Work least = Work(rule.floor);
    for (uint64_t j = 0; j < count; ++j) {
      const Work by = pick(divisor[j] > least, divisor[j], least);
      const Work mean = total[j] / pick(by == 0, Work(1), by);
      merged[j] = block.base[j] + keep(selected[j] != 0, mean);
    }
  }

  void important(uint64_t i, uint64_t count) {  // P7
    importances(block, rule.key, i, count);
    const Work* own = block.delta(0);
    Key<Work> kept = 0;
    for (uint64_t j = 0; j < count; ++j) {
      const bool keeps = block.keys[j] >= bound;
      merged[j] = block.base[j] + keep(keeps, own[j]);
      kept += keeps;
    }
    stats.kept[0] += kept;
  }
};

template <class Work>
void merge(const MaskedInputs& in, const MaskedRule& rule, uint64_t begin, uint64_t end, void* out,
           DType out_type, MaskedStats& stats) {
  Merger<Work> merger(in, rule, stats);
  for (uint64_t i = begin; i < end; i += kBlock) {
    merger.run(i, std::min<uint64_t>(kBlock, end - i), out, out_type);
  }
}
