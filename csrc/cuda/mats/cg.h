// Conjugate gradient on an NVIDIA GPU (docs/spec/mats.md, M6 to M9): what the
// bindings call. Plain C++, without CUDA's headers.
//
// An iteration is four launches beside its matrix products: `cg_dot` of p and q, `cg_advance`,
// `cg_dot` of r and z, `cg_turn`. `cg_small` is a whole run. Every function enqueues one kernel on
// the caller's stream and returns; nothing is allocated, no scalar goes to the host. All memory is
// the device's, contiguous, the caller's until the stream has passed. Sums are binary64 in an order
// that depends on the shape and chunk alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/core/place.h"

namespace pymerge::cuda {

// Layers of n elements, one behind the other; a block of threads takes `chunk` of them, a multiple
// of 1024.
struct CgShape {
  std::int64_t layers = 0, n = 0, chunk = 0;
  DType dtype = DType::kFloat32;  // or kFloat64

  std::int64_t chunks() const { return n <= chunk ? 1 : (n + chunk - 1) / chunk; }
};

// A layer's row of the table, in the order of pymerge/backends/cg/device.py; flags are 0 or 1. A
// launch reads one table and writes another: blocks of a layer that start late still find what it
// began with.
struct CgState {
  double rho, rr, dd, decrease, done, gain;
  double active, converged, limited, broke;
  double enough, limit2, tolerance;
};
static_assert(sizeof(CgState) == 13 * sizeof(double));

// parts[layer][chunk] = <x, y> over the chunk.
void cg_dot(const CgShape& shape, const void* x, const void* y, double* parts, Place place);

// step += alpha p, r -= alpha q, and all of `Run.advance` but the test of convergence. curvatures:
// [layer][chunk], <p, q>. directions: [layer][chunk][2], <p, p> and <step, p>; null where no step
// is limited. sums: [layer][chunk][2], the new <r, r> and <step, step>.
struct CgAdvance {
  void *step = nullptr, *r = nullptr;
  const void *p = nullptr, *q = nullptr;
  const double *curvatures = nullptr, *directions = nullptr;
  double* sums = nullptr;
  const CgState* state = nullptr;
  CgState* state_out = nullptr;
};
void cg_advance(const CgShape& shape, const CgAdvance& vectors, Place place);

// The test of convergence, then p = z + beta p. followings: [layer][chunk], <r, z>; null where z is
// r. directions: written unless null, and step is not read where it is.
struct CgTurn {
  void* p = nullptr;
  const void *z = nullptr, *step = nullptr;
  const double *followings = nullptr, *sums = nullptr;
  double* directions = nullptr;
  const CgState* state = nullptr;
  CgState* state_out = nullptr;
};
void cg_turn(const CgShape& shape, const CgTurn& vectors, Place place);

// Layers of up to 256 x 256, fp32, a block of threads each: the `Problem` of
// pymerge/backends/cg/device.py. What is not there is null.
struct CgSmall {
  std::int64_t layers = 0;
  int d_out = 0, d_in = 0;
  int count = 0;  // matrices A a layer; 1 without b
  float *step = nullptr, *r = nullptr;
  const float *a = nullptr, *b = nullptr, *right = nullptr, *left = nullptr;
  std::int64_t a_stride = 0, right_stride = 0;
  float* scratch = nullptr;
  CgState* state = nullptr;
  bool limits = false;
  int iterations = 0;
};
void cg_small(const CgSmall& problem, Place place);

}  // namespace pymerge::cuda
