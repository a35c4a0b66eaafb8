// The loops of kernels_body.h at the level portable.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "common/philox.h"
#include "cpu/ties/kernels.h"

namespace pymerge::cpu {
namespace portable {
namespace {
#include "cpu/core/vec_portable.h"
#include "cpu/ties/kernels_body.h"
}  // namespace
}  // namespace portable

const Kernels kPortableKernels = portable::table("portable");

}  // namespace pymerge::cpu
