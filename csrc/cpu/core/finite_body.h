// Included once per instruction set by finite.cpp. An element is not finite where all bits of its
// exponent are set.

// The inner loop's counter is as wide as an element, so that the compiler's vectors count without
// unpacking.
template <typename Word, Word kExponent>
uint64_t count(const unsigned char* data, uint64_t n) {
  uint64_t total = 0;
  while (n > 0) {
    const uint64_t some = n < kRun ? n : kRun;
    Word found = 0;
    for (uint64_t at = 0; at < some * sizeof(Word); at += 64) {
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(data) + at + kAhead;
      __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);
    }
    for (uint64_t i = 0; i < some; ++i) {
      Word word;
      std::memcpy(&word, data + i * sizeof(Word), sizeof(Word));
      found = Word(found + Word((word & kExponent) == kExponent));
    }
    total += found;
    data += some * sizeof(Word);
    n -= some;
  }
  return total;
}

inline uint64_t count_of(DType type, const unsigned char* data, uint64_t n) {
  switch (type) {
    case DType::kFloat16:
      return count<uint16_t, 0x7c00u>(data, n);
    case DType::kBFloat16:
      return count<uint16_t, 0x7f80u>(data, n);
    case DType::kFloat64:
      return count<uint64_t, 0x7ff0000000000000u>(data, n);
    case DType::kFloat32:
      break;
  }
  return count<uint32_t, 0x7f800000u>(data, n);
}
