// Which instruction set levels the binary holds, and which one runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpu/ties/kernels.h"

namespace pymerge::cpu {

// (name, usable on this processor), slowest first.
std::vector<std::pair<std::string, bool>> levels();

// The best usable level, or the one named; std::invalid_argument for one that is unknown or not usable here.
const Kernels& kernels(const std::string& level);

}  // namespace pymerge::cpu
