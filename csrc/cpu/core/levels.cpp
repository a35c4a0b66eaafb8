#include "cpu/core/levels.h"

#include <stdexcept>

namespace pymerge::cpu {
namespace {

struct Level {
  const char* name;
  bool usable;
};

const std::vector<Level>& table() {
  // Never destroyed: calls may still run while the process exits.
  static const auto& levels = *new std::vector<Level>([] {
    std::vector<Level> found = {{"portable", true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    found.push_back({"avx2", avx2});
    found.push_back({"avx512", avx512});
#endif
    return found;
  }());
  return levels;
}

}  // namespace

std::vector<std::pair<std::string, bool>> levels() {
  std::vector<std::pair<std::string, bool>> names;
  for (const Level& level : table()) names.emplace_back(level.name, level.usable);
  return names;
}

const char* pick_level(const std::string& level) {
  std::string usable;
  const char* best = nullptr;
  for (const Level& candidate : table()) {
    if (!candidate.usable) continue;
    best = candidate.name;
    if (level == candidate.name) return candidate.name;
    usable += usable.empty() ? "" : ", ";
    usable += candidate.name;
  }
  if (level.empty()) return best;
  bool known = false;
  for (const Level& candidate : table()) known |= level == candidate.name;
  throw std::invalid_argument(
      "PYMERGE_CPU_LEVEL=" + level +
      (known ? " is not available on this processor" : " is not a level of this build") +
      "; available here: " + usable);
}

}  // namespace pymerge::cpu
