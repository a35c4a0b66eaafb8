// The loops of kernels_body.h at the level avx2.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "common/philox.h"
#include "cpu/ties/kernels.h"

// After every other include: what stands in the region may use these instructions, what stands
// before it may not.
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,fma,f16c,popcnt")

namespace pymerge::cpu {
namespace avx2 {
namespace {
#include "cpu/core/vec_avx2.h"
#include "cpu/ties/kernels_body.h"
}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::table("avx2");

}  // namespace pymerge::cpu

#pragma GCC pop_options
#endif
