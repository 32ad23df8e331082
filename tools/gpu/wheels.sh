#!/usr/bin/env bash
# Fetch, on a machine with network, what a GPU machine of tools/gpu/machine.txt lacks for checks.sh:
#
#     tools/gpu/wheels.sh DIR        then carry DIR there: tools/gpu/checks.sh --wheels DIR
set -eu
target=${1:?usage: wheels.sh DIR}

# pip takes these tags literally: a wheel for 2_17 is not found by asking for 2_28.
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 17 24 27 28 31 34 35; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
"${PYTHON:-python3}" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d "$target" -r "$(dirname "$0")/wheels.txt"
