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
flags=(-std=c++17 -O1 -g1 -ffp-contract=off -fno-math-errno -fno-omit-frame-pointer
  -fsanitize=address,undefined -fno-sanitize-recover=all "-I$root/csrc")
sources=("$root"/tests/sanitize/*.cpp "$root"/csrc/cpu/{core,ties}/*.cpp)
printf '%s\n' "${sources[@]}" |
  grep -v '/csrc/cpu/core/scratch\.cpp$' |
  xargs -P "$(nproc)" -I{} sh -c 'source=$1; folder=$2; shift 2; exec "${CXX:-c++}" "$@" -c "$source" -o "$folder/$(basename "$source").o"' \
    _ {} "$folder" "${flags[@]}"
"${CXX:-c++}" -fsanitize=address,undefined -pthread "$folder"/*.o -o "$folder/driver"
UBSAN_OPTIONS=print_stacktrace=1 "$folder/driver" "${1:-300}" "${2:-20}"
