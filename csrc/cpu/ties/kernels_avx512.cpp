// The loops of kernels_body.h at the level avx512.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>

// GCC 12 takes the undefined pass-through operands of its own intrinsics for uninitialised
// variables.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "common/philox.h"
#include "cpu/ties/kernels.h"

// After every other include: what stands in the region may use these instructions, what stands
// before it may not.
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,f16c,popcnt,avx512f,avx512bw,avx512dq,avx512vl")

namespace pymerge::cpu {
namespace avx512 {
namespace {
#include "cpu/core/vec_avx512.h"
#include "cpu/ties/kernels_body.h"
}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::table("avx512");

}  // namespace pymerge::cpu

#pragma GCC pop_options
#endif
