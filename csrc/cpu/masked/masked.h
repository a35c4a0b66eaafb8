// The op `masked` on the CPU (docs/spec/masked.md): what a merge under masks has to know of the
// whole tensor, each in one read of the inputs, and the merge itself in one more. No result depends
// on the number of threads nor on the level.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/key.h"
#include "cpu/core/buffer.h"

namespace pymerge::cpu {

// A base, and models of the same n elements. wide: whether the working precision is binary64.
struct MaskedInputs {
  std::vector<Buffer> models;
  Buffer base;
  uint64_t n;
  bool wide;
  int threads;
  std::string level;
};

// P2: the number by which elements are compared. Negative importances are compared by how far they
// are below 0, and the others by how far above it; what is on the other side has key 0.
struct MaskedKey {
  enum class Kind : int { kVariance = 0, kImportance = 1, kNegativeImportance = 2 } kind;
  Buffer divergences;  // of each row, in the working precision
  uint64_t row = 1;    // elements a row
};

struct MaskedRule {
  enum class Merge : int { kNear = 0, kOverlap = 1, kConsensus = 2, kImportance = 3 } merge;
  MaskedKey key;
  double bound;                 // P4: t; P5: epsilon; P6 and P7: the least key that is selected
  bool whole;                   // P6: all elements are selected, and no key is looked at
  std::vector<double> factors;  // P5: lambda_k; P6: w_k
  double floor;                 // P6: the least divisor; 0: a divisor of 0 becomes 1
};

// TiesStats of pymerge/rules/ties.py.
struct MaskedStats {
  std::vector<uint64_t> kept, non_finite;
  uint64_t conflicts = 0;
};

// Keys of elements i .. i + count - 1; Work is the working precision.
template <class Work>
void masked_keys(const MaskedInputs&, const MaskedKey&, uint64_t i, uint64_t count, Key<Work>* dst);

// P2: the divergence of each row of `row` elements, n / row numbers in the working precision, which
// are written to `out`; exact: computed in binary64. Returns the least. A row's exponentials are
// held in memory of their own.
double masked_divergences(const MaskedInputs&, uint64_t row, bool exact, void* out);

// How many keys are above 0.
uint64_t masked_nonzero(const MaskedInputs&, const MaskedKey&);

// P6: the sum of squares of each task vector over the selected elements, in the order of P6.
std::vector<double> masked_energies(const MaskedInputs&, const MaskedRule&);

// P5: of each model, the elements that others have too, and those that it alone has.
std::vector<std::pair<uint64_t, uint64_t>> masked_overlaps(const MaskedInputs&, double epsilon);

// Merges into `out`, which overlaps no input.
MaskedStats masked(const MaskedInputs&, const MaskedRule&, void* out, DType out_type);

}  // namespace pymerge::cpu
