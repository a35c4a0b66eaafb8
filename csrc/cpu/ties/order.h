// Order statistics of keys that lie in memory.
#pragma once

#include <cstdint>

#include "cpu/ties/kernels.h"

namespace pymerge::cpu {

// keys[0 .. count - 1], all of them in [low, high), by rank from the largest. One histogram, then
// each rank costs a look at its bin and a pass that packs the bin's keys.
class Order {
 public:
  // `spare` has room for count + 16 keys; it may be `keys` itself where only one rank is asked for.
  Order(const Kernels& kernels, const uint32_t* keys, uint64_t count, uint32_t low, uint32_t high,
        uint32_t* spare);

  // The rank-th largest, 1 <= rank <= count.
  uint32_t nth(uint64_t rank) const;

 private:
  static constexpr uint32_t kBins = 1024;
  static constexpr uint64_t kFew = 256;  // keys that are ordered without a histogram

  const Kernels& kernels_;
  const uint32_t* keys_;
  uint64_t count_;
  uint32_t low_;
  unsigned shift_ = 0;  // a bin is 2^shift keys wide
  uint32_t* spare_;
  uint32_t bins_[kBins];
};

// The rank-th largest of any keys, which are packed and reordered; there is room for 16 more.
uint32_t nth_key(const Kernels& kernels, uint32_t* keys, uint64_t count, uint64_t rank);

}  // namespace pymerge::cpu
