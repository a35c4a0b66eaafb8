// Which instruction set levels the binary holds, and which one runs.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace pymerge::cpu {

// (name, usable on this processor), slowest first.
std::vector<std::pair<std::string, bool>> levels();

// The name of the best usable level, or the one asked for; std::invalid_argument for one that is
// unknown or not usable here.
const char* pick_level(const std::string& level);

}  // namespace pymerge::cpu
