#!/usr/bin/env bash
# Every check and benchmark that means something on one GPU, unattended, on a machine without network:
#
#     tools/bench/gpu.sh --wheels DIR --max-minutes N [--shape 7B]
#
# The machine has Python 3.12 and the packages of tools/bench/gpu_machine.txt. DIR holds what it lacks as wheels (gpu_wheels.sh DIR).
# A wheel that is missing costs the benchmarks that need it, not the others, and none may take the time of those after it.
# Results: tools/bench/results/<device>/*.json; logs beside.
set -u
cd "$(dirname "$0")/../.."

wheels="" minutes=25 shape=7B
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=$(realpath "$2"); shift 2 ;;
    --max-minutes) minutes=$2; shift 2 ;;
    --shape) shape=$2; shift 2 ;;
    *) echo "gpu.sh: unknown option $1; known: --wheels DIR, --max-minutes N, --shape demo|0.5B|1.5B|7B" >&2; exit 2 ;;
  esac
done
deadline=$(( $(date +%s) + 60 * minutes ))
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/tests/unit:$PWD/tools/bench" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  # One by one: a wheel for another platform must not keep the others out.
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" --upgrade "$wheel" \
      || echo "gpu.sh: $(basename "$wheel") did not install" >&2
  done
  export PYTHONPATH="$PYTHONPATH:$scratch/site"
fi

device=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
  echo "gpu.sh: torch sees no GPU with $python; set PYTHON to the interpreter that has torch with CUDA" >&2
  exit 1
}
logs=tools/bench/results/$device
mkdir -p "$logs"
failed=""

step() { # NAME SHARE COMMAND...: at most SHARE percent of all the time, and what is left of it
  local name=$1 share=$(( 60 * minutes * $2 / 100 )) left=$(( deadline - $(date +%s) ))
  shift 2
  if [ "$left" -lt 30 ]; then
    echo "== $name: skipped, the $minutes minutes are over"
    failed="$failed $name"
    return
  fi
  echo "== $name ($left s left)"
  if timeout "$(( left < share ? left : share ))" "$@" > "$logs/$name.log" 2>&1; then
    tail -n 1 "$logs/$name.log" | cut -c1-400
  else
    echo "   failed with exit code $?; the end of $logs/$name.log:"
    tail -n 5 "$logs/$name.log"
    failed="$failed $name"
  fi
}

# The most telling first, in case time runs out.
step tests 25 "$python" -m pytest -q -p no:cacheprovider -o addopts="" tests/gpu
step head_kernel 30 "$python" tools/bench/head_kernel.py --write-table
step probe_cost 15 "$python" tools/bench/probe_cost.py --shape "$shape" --turns 1,5,10 --no-engine
step tree_attention 15 "$python" tools/bench/tree_attention.py
step head_memory 10 "$python" tools/bench/head_memory.py
step head_precision 10 "$python" tools/bench/head_precision.py
step tree_training 15 "$python" tools/bench/tree_training.py --shape 0.5B
if "$python" -c 'import vllm, ray' 2> /dev/null; then
  step vllm_score 20 "$python" tools/bench/vllm_score.py --shape "$shape"
  step weight_sync 20 "$python" tools/bench/weight_sync.py --shape "$shape"
else
  echo "== vllm_score, weight_sync: not run, vllm and ray are not importable"
fi
[ -z "$failed" ] || { echo "not done:$failed"; exit 1; }
