// What every instruction set level offers: a table of loops over one block of elements. A loop has
// no state of its own and touches no element outside its block. See kernels_body.h for the loops
// and kernels.cpp for which table is used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "common/ties.h"
#include "cpu/core/buffer.h"

namespace pymerge::cpu {

// Magnitudes are compared as keys: the bits of |delta|, which order as the magnitudes do; NaN has
// key 0 (N1).
inline uint32_t key_of(float delta) {
  const uint32_t key = float_bits(delta) & 0x7fffffffu;
  return key > 0x7f800000u ? 0 : key;
}

inline constexpr unsigned kTile = 64;          // the fused loops take multiples of so many elements
inline constexpr unsigned kFusedBlock = 2048;  // the most elements a call
inline constexpr unsigned kRow = 64;           // lanes of norms
inline constexpr unsigned kNormCall = 16384;   // elements a call of their loop

// What the fused loop compares |delta| with, beside the threshold: nothing; `high`; `high` and
// `low`.
enum class Compare : int { kThreshold = 0, kHigh = 1, kBracket = 2 };
// The election weights e_k (T4): all 1; w_k; others.
enum class Votes : int { kOnes = 0, kWeights = 1, kOwn = 2 };

// What all tensors of a merge have in common: nothing; they are fp32; they are bf16, and 32
// elements are taken as the even and the odd ones.
enum class Types : int { kAny = 0, kFloats = 1, kPairs = 2 };

struct FusedModel {
  Buffer x;
  // Trim::kMagnitude and kNone: kept from this magnitude on; above 0, infinity keeps none.
  // kOutliers: kept from `lower`, where NaN keeps none, to `upper`.
  float lower, upper;
  float high, low;
  float weight, vote;  // w_k, e_k
  Rescale rescale;
  float rescale_by;
  uint64_t cutoff;       // T3 random
  const uint64_t* bits;  // what that keeps, where it has been drawn: a bit an element of the tensor
};

// One merge. The loops take fp32, fp16 and bf16 in any mix and convert as they load.
struct FusedArgs {
  const FusedModel* models;
  int count;
  Buffer base;
  void* out;  // at the tensor's first element, as all buffers
  DType out_type;
  Types types;
  bool stream;  // non-temporal stores; what a call writes begins on a 64-byte boundary
  Trim trim;
  Compare compare;
  Votes votes;
  bool unit;      // all w_k are 1
  bool rescales;  // some model's task vector is rescaled
  Elect elect;
  Merge merge;
  bool majority;           // the signs of S are counted, and S = 0 elects what `zero_negative` says
  uint16_t zero_negative;  // all bits where it elects -
  float denominator;       // what that of T5 starts from
  float scaling;
  uint64_t key, first;  // T8
};

// One bit an element, 16-bit words; with `Types::kPairs` a pair of words holds the even and the odd
// ones of 32 elements. Rows of models are `words` apart.
struct FusedMasks {
  unsigned words;
  uint16_t *keep, *high, *low;               // [models][words]
  uint16_t *conflict, *positive, *negative;  // [words]; the signs of S only with `majority`
  float* values;                             // [models][kTile], the loop's own
};

// Merges elements i .. i + count - 1; count is a multiple of kTile, at most 16 * masks.words. False
// where some task vector may not be finite: the block is then to be done anew, by the scalar rule.
using FusedLoop = bool (*)(const FusedArgs&, uint64_t i, unsigned count, const FusedMasks&);

struct FusedCounts {
  uint64_t *kept, *high;  // per model
  uint64_t conflicts = 0, positive = 0, negative = 0;
  uint64_t undecided = 0;  // S = 0 from values of both signs: where the zero sign of T4 matters
};

// T9: |delta|, its square, or the largest |delta|.
enum class Norms : int { kSum = 0, kSquares = 1, kLargest = 2 };

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
  bool below_estimate = false;  // the bracket ends at the threshold that is merged by
  int models = 0;
  uint32_t* pending = nullptr;  // [kPendingRoom] positions that are to be collected
  unsigned pending_count = 0;
};
inline constexpr unsigned kPendingRoom = 2 * kFusedBlock;  // a whole block's behind others

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

  FusedLoop fused;
  // Adds what the masks of a block say.
  void (*fused_counts)(const FusedArgs&, unsigned elements, const FusedMasks&, FusedCounts&);
  // Appends the positions of one model's elements with bit low and not high, or not keep, to
  // `pending`; `first` is the block's first.
  void (*candidates)(const FusedArgs&, const FusedMasks&, int model, unsigned elements,
                     uint32_t first, Collected&);
  // Puts them into the list.
  void (*collect)(const FusedArgs&, int model, Collected&);

  // T9 for elements i .. i + count - 1, at most kNormCall: what is added up, or the largest, of
  // |delta| over all elements and over those that are kept (from `lower` to `upper`, for every trim
  // by magnitude) of each model, to sums[models][2]. lanes: [models][2 * kRow], the loop's own.
  // What random trim keeps goes to `drawn`, if that is not null, as FusedModel::bits, rows of
  // models `stride` apart; with FusedModel::bits given, these are what is kept.
  void (*norms)(const FusedArgs&, uint64_t i, unsigned count, Norms, uint64_t* drawn,
                uint64_t stride, double* lanes, double* sums);

  // T8: the words of elements i .. i + count - 1 of one model; i is a multiple of 4, and dst has
  // room for 3 more.
  void (*words)(uint64_t i, uint64_t count, uint32_t model, uint64_t key, uint32_t* dst);

  // Reads `count` buffers, writes one: the same bytes as a merge moves, and nothing else.
  void (*copy)(const void* const* sources, int count, void* out, uint64_t bytes);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace pymerge::cpu
