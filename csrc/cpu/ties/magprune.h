// T3 `magprune`: what it keeps, as a bit an element.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ties/plan.h"

namespace pymerge::cpu {

// A tensor's rows: `length` elements each, `step` apart; every length * step elements hold `step`
// rows.
struct Rows {
  uint64_t length, step;
};

// Writes what is kept of elements begin .. end - 1 of every model to bits[models][stride], element
// `begin` first; there is room for one more word behind the last. Rows are ordered in memory of
// their own, 16 bytes an element of a row and thread.
template <class Work>
void draw_magprune(const Context&, const Plan<Work>&, Rows, const std::vector<double>& densities,
                   const std::vector<double>& epsilons, uint64_t begin, uint64_t end,
                   uint64_t* bits, uint64_t stride);

}  // namespace pymerge::cpu
