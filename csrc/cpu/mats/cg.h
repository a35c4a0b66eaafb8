// The vector work of a conjugate-gradient iteration (docs/spec/mats.md, M6), one pass over memory
// each, for a stack of layers of n elements that lie one behind the other. Products and sums are in
// binary64, in an order that depends on n alone: the same bits for every number of threads and
// every instruction set level.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pymerge::cpu {

// Calls may be made for float and double. `threads` is at most what is used; little work is done by
// the caller alone.
struct CgShape {
  uint64_t layers, n;
  int threads;
  std::string level;
};

// <x, y> of each layer.
template <typename T>
std::vector<double> cg_dot(const CgShape&, const T* x, const T* y);

// step += alpha p, r -= alpha q for layers with alpha != 0; the others are only read. (<r, r>,
// <step, step>) of each. Moves 4 reads and 2 writes of n elements. The four do not overlap.
template <typename T>
std::vector<std::pair<double, double>> cg_advance(const CgShape&, T* step, T* r, const T* p,
                                                  const T* q, const std::vector<double>& alpha);

// p = z + beta p, or p = z for layers with beta 0. (<p, p>, <step, p>) of each. 3 reads, 1 write. p
// overlaps nothing.
template <typename T>
std::vector<std::pair<double, double>> cg_turn(const CgShape&, T* p, const T* z, const T* step,
                                               const std::vector<double>& beta);

}  // namespace pymerge::cpu
