#!/usr/bin/env bash
# Every check and benchmark that means something on one GPU, unattended, on a machine without network:
#
#     tools/gpu/checks.sh --wheels DIR [--out DIR] [--archive FILE.tar.gz] [--parts smoke,trees] [--model DIR]
#     tools/gpu/checks.sh --device cpu --small         the same parts on a CPU, each as small as it can be
#
# DIR holds what the machine lacks as wheels (tools/gpu/wheels.sh DIR); PYTHON names its interpreter. checks.py says the rest.
exec "${PYTHON:-python3}" "$(dirname "$0")/checks.py" "$@"
