// What every instruction set level offers: a table of loops over one block of elements. A loop has
// no state of its own and touches no element outside its block. See kernels_body.h for the loops
// and kernels.cpp for which table is used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/ties.h"

namespace pymerge::cpu {

// A tensor: contiguous elements from `data`, of any alignment. No data: there is no such tensor.
struct Buffer {
  const void* data = nullptr;
  DType type = DType::kFloat32;

  const void* at(uint64_t i) const { return static_cast<const char*>(data) + i * size_of(type); }
};

// Magnitudes are compared as keys: the bits of |delta|, which order as the magnitudes do; NaN has
// key 0 (N1).
inline uint32_t key_of(float delta) {
  const uint32_t key = float_bits(delta) & 0x7fffffffu;
  return key > 0x7f800000u ? 0 : key;
}

inline constexpr int kFusedModels = 8;  // the most models that the fused loops take at once
inline constexpr unsigned kFusedBlock =
    2048;  // elements a call: masks and streams of 8 models stay in the L1 cache
inline constexpr unsigned kWords = kFusedBlock / 16;
inline constexpr unsigned kRow = 64;           // T9: lanes
inline constexpr unsigned kNormChunk = 16384;  // T9: elements a chunk

// What the fused loop compares |delta| with, beside the threshold: nothing; `high`; `high` and
// `low`.
enum class Compare : int { kThreshold = 0, kHigh = 1, kBracket = 2 };
// Which weights there are: none (all 1); w_k in election and merge; w_k in the merge alone; w_k and
// no election.
enum class Weights : int { kUnit = 0, kBoth = 1, kMerge = 2, kNoElection = 3 };

struct FusedArgs {
  const void* model[kFusedModels];  // each at the block's first element
  const void* base;
  void* out;
  float lower[kFusedModels];  // kept from this magnitude on; above 0, infinity keeps none
  float high[kFusedModels];
  float low[kFusedModels];
  float weight[kFusedModels];
  float increment[kFusedModels];  // added to the denominator for each agreeing model
  float denominator;              // what it starts from
  float scaling;
  uint16_t zero_negative;  // all bits where S = 0 elects -, with `majority`
  bool stream;             // non-temporal stores; `out` is on a 64-byte boundary
};

// One bit an element and model. 16-bit words; for bf16 a pair of words holds the even and the odd
// ones of 32 elements.
struct FusedMasks {
  uint16_t keep[kFusedModels][kWords];
  uint16_t high[kFusedModels][kWords];
  uint16_t low[kFusedModels][kWords];
  uint16_t agree[kFusedModels][kWords];  // kept, the election value has the elected sign (without
                                         // election: is > 0)
  uint16_t disagree[kFusedModels]
                   [kWords];  // kept, it has the other one; not written for Weights::kUnit
  uint16_t positive[kWords];  // S > 0; this and the next only with `majority`
  uint16_t negative[kWords];  // S < 0
};

// Merges `count` elements (a multiple of 16, for bf16 of 32, at most kFusedBlock). False where some
// task vector may not be finite: the block is then to be done anew, by the scalar rule.
using FusedLoop = bool (*)(const FusedArgs&, unsigned count, FusedMasks&);

struct FusedCounts {
  uint64_t kept[kFusedModels] = {};
  uint64_t high[kFusedModels] = {};
  uint64_t conflicts = 0, positive = 0, negative = 0;
  uint64_t undecided = 0;  // S = 0 from values of both signs: where the zero sign of T4 matters
};

// Elements inside one model's bracket. Those close to the estimate, [near_low, near_low +
// near_span), are the likely ones to be merged again, and keep the inputs' values with them; the
// others are keys and positions. Where there is no room left for values they join the others; where
// there is none for those either, the list overflows and is of no use.
struct Collected {
  uint32_t *keys = nullptr, *positions = nullptr;
  uint64_t count = 0, capacity = 0;
  bool overflow = false;
  uint32_t* near_keys = nullptr;
  uint32_t* records = nullptr;  // [near_capacity][models + 2]: position, models, base as fp32 bits
  uint64_t near_count = 0, near_capacity = 0;
  uint32_t near_low = 0, near_span = 0;
  int models = 0;
  uint32_t* pending = nullptr;  // [kPendingRoom] positions that are to be collected
  unsigned pending_count = 0;
};
inline constexpr unsigned kPendingRoom = 2 * kFusedBlock;  // a whole block's behind others

struct GeneralArgs {
  const Buffer* models;
  int count;
  Buffer base;
  void* out;  // at the tensor's first element
  DType out_type;
  Trim trim;
  const float* lower;  // per model; NaN keeps none
  const float* upper;
  const uint64_t* cutoff;  // T3 random
  uint64_t key, first;     // T8
  ElementRule<float> rule;
};

struct GeneralCounts {
  uint64_t* kept;  // per model
  uint64_t conflicts = 0, positive = 0, negative = 0, undecided = 0;
};

struct GeneralScratch {
  unsigned block;                               // elements, a multiple of 64
  float *base, *sum, *numerator, *denominator;  // [block]
  float* delta;                                 // [count][block]
  uint16_t* keep;                               // [count][block / 16]
  uint16_t *above, *below, *negative;           // [block / 16]
  uint32_t* words;                              // [block + 8]
};

struct Kernels {
  const char* name;

  // Keys of x - base at elements i .. i + count - 1; dst has room for 16 more.
  void (*keys)(const Buffer& x, const Buffer& base, uint64_t i, uint64_t count, uint32_t* dst);

  // Packs the keys in [low, high) to dst, in order, and returns their number; adds the number of
  // keys >= high to *above. dst has room for 16 more; it may be `keys` itself.
  uint64_t (*partition)(const uint32_t* keys, uint64_t count, uint32_t low, uint32_t high,
                        uint32_t* dst, uint64_t* above);

  // The same without the packing.
  uint64_t (*count)(const uint32_t* keys, uint64_t count, uint32_t low, uint32_t high,
                    uint64_t* above);

  // How many of the 16-key groups' keys are >= bound, per `unit` keys (a multiple of 16).
  void (*count_units)(const uint32_t* keys, uint64_t units, unsigned unit, uint32_t bound,
                      uint16_t* counts);

  // null where this level has none for the combination. majority: counts the signs of S and lets
  // `zero_negative` say what S = 0 elects; else that is +.
  FusedLoop (*fused)(DType type, int count, Weights weights, Compare compare, bool majority);
  // May clear masks behind the block's end.
  void (*fused_counts)(FusedMasks&, int count, unsigned elements, Weights, Compare, bool majority,
                       FusedCounts&);
  // Appends the positions of one model's elements with bit low and not high to `pending`; `first`
  // is the block's first.
  void (*candidates)(DType, const FusedMasks&, int model, unsigned count, uint32_t first,
                     Collected&);
  // Puts them into the list. The tensors from their first elements on; base may be null.
  void (*collect)(DType, const void* const* models, const void* base, int model, Collected&);

  // Any number of models and mix of fp32, fp16 and bf16. False as for FusedLoop.
  bool (*general)(const GeneralArgs&, uint64_t i, unsigned count, const GeneralScratch&,
                  GeneralCounts&);

  // T9 for one chunk: sums of |delta| (squares: of delta^2) over all and over the kept elements,
  // and the largest ones. delta: fp32, padded with zeros to whole rows; keep: one bit an element.
  void (*norms)(const float* delta, const uint16_t* keep, unsigned count, bool squares,
                double sums[2]);

  // Task vectors as fp32; dst has room for 16 more.
  void (*deltas)(const Buffer& x, const Buffer& base, uint64_t i, uint64_t count, float* dst);

  // Reads `count` buffers, writes one: the same bytes as a merge moves, and nothing else.
  void (*copy)(const void* const* sources, int count, void* out, uint64_t bytes);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace pymerge::cpu
