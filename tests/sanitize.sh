#!/usr/bin/env bash
# The loops of ties under AddressSanitizer and UndefinedBehaviorSanitizer, without Python: builds csrc/cpu/core and csrc/cpu/ties
# with tests/sanitize/driver.cpp into a scratch folder and runs it. The scratch arena is that of tests/sanitize/scratch.cpp,
# which tells AddressSanitizer where its blocks end.
#
#   tests/sanitize.sh [number of merges [seed]]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${SANITIZE_BUILD:-$(mktemp -d)}
[ -n "${SANITIZE_BUILD:-}" ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder"
# -Og compiles in three quarters of the time of -O1.
flags=(-std=c++17 -Og -g1 -ffp-contract=off -fno-math-errno -fno-omit-frame-pointer
  -fno-sanitize-recover=all "-I$root/csrc")
compile() { # source
  local sanitizers=address,undefined
  # The loops of all instruction sets, whose compilation takes as long again with the other one: `make sanitize-suite` has both.
  [[ $1 != */kernels_*.cpp ]] || sanitizers=address
  "${CXX:-c++}" "${flags[@]}" -fsanitize=$sanitizers -c "$1" -o "$folder/$(basename "$1").o"
}
jobs=()
for source in "$root"/tests/sanitize/*.cpp "$root"/csrc/cpu/{core,ties}/*.cpp; do
  [[ $source != */core/scratch.cpp ]] || continue
  [ ${#jobs[@]} -lt "$(nproc)" ] || { wait "${jobs[0]}"; jobs=("${jobs[@]:1}"); }
  compile "$source" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"${CXX:-c++}" -fsanitize=address,undefined -pthread "$folder"/*.o -o "$folder/driver"
UBSAN_OPTIONS=print_stacktrace=1 "$folder/driver" "${1:-300}" "${2:-20}"
