// For which devices the kernels were compiled. A question to the runtime itself would make a
// context on a device, hundreds of megabytes, which nobody may want to use.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace pymerge::cuda {

// Whether a device of compute capability major.minor runs any of the codes, named as nvcc does with
// commas between them: sm_86 is for 8.6 to 8.9; compute_86, which the driver compiles, for all from
// 8.6 on; with a letter behind it either is for that capability alone, or (f) for its major one.
inline bool runs(const std::string& codes, int major, int minor) {
  const int own = 10 * major + minor;
  std::istringstream list(codes);
  for (std::string code; std::getline(list, code, ',');) {
    const std::size_t at = code.find('_');
    if (at == std::string::npos) continue;
    char* rest = nullptr;
    const int of = static_cast<int>(std::strtol(code.c_str() + at + 1, &rest, 10));
    const bool same_major = own / 10 == of / 10, enough = own >= of;
    if (*rest == 'a' ? own == of : enough && (same_major || (*rest == '\0' && code[0] == 'c')))
      return true;
  }
  return false;
}

}  // namespace pymerge::cuda
