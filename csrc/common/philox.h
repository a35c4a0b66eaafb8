// T8: Philox 4x32 with 10 rounds (Salmon et al. 2011), as tl.philox and the papers' generators take
// it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

struct PhiloxBlock {
  uint32_t word[4];
};

// Counter (low and high word of group, model, 0), key low word first. Element i is word i % 4 of
// group i / 4.
PYMERGE_HD inline PhiloxBlock philox(uint64_t group, uint32_t model, uint64_t key) {
  uint32_t c0 = uint32_t(group), c1 = uint32_t(group >> 32), c2 = model, c3 = 0;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

PYMERGE_HD inline uint32_t philox_word(uint64_t i, uint32_t model, uint64_t key) {
  return philox(i >> 2, model, key).word[i & 3];
}

// T3 `random`: kept iff the word is below this; 2^32 keeps all.
PYMERGE_HD inline uint64_t random_cutoff(double density) {
  return density >= 1 ? uint64_t(1) << 32 : uint64_t(density * 4294967296.0);
}

}  // namespace pymerge
