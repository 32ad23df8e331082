#!/usr/bin/env bash
# Train on one node: torchrun starts the ranks, rank 0 starts Ray and the engines.
#
#   [RANKS=4] examples/train_1node.sh examples/igpo_qwen2.5_7b.yaml [section.key=value ...]
#
# RANKS    processes, one per GPU from 0 on (default 4); the engines take the GPUs that rollout.engine.gpu_ids names
# DRY_RUN  any value: print the command instead of running it
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

command=(
    torchrun --nnodes 1 --nproc-per-node "${RANKS:-4}"
    --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1
    -m igpo_megatron.training.main "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "${command[*]}"
    exit 0
fi
exec "${command[@]}"
