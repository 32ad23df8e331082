#!/usr/bin/env bash
# Train on several nodes: run this on each of them, after examples/start_ray.sh runs on each of them.
#
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=10.0.0.1:29400 examples/train_multinode.sh CONFIG.yaml rollout.engine.ray_address=10.0.0.1:6379
#   NNODES=2 NODE_RANK=1 RDZV_ENDPOINT=10.0.0.1:29400 examples/train_multinode.sh CONFIG.yaml rollout.engine.ray_address=10.0.0.1:6379
#
# NNODES         nodes
# NODE_RANK      0 on the node of RDZV_ENDPOINT, which holds the meeting point; any other number elsewhere
# RDZV_ENDPOINT  host:port of that node
# RANKS          processes on this node, one per GPU from 0 on (default 4)
# NODE_IP        address of this node that the others reach (default: what torchrun finds)
# JOB            name of this run's meeting; needed where two runs share an endpoint (default igpo)
# DRY_RUN        any value: print the command instead of running it
#
# torchrun numbers the ranks by the nodes' addresses, not by NODE_RANK, and rank 0 joins Ray on its own node and writes run.folder:
# so Ray runs on every node (without GPUs where there are no engines), and run.folder is on storage that all nodes share.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: NNODES=.. NODE_RANK=.. RDZV_ENDPOINT=host:port $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
: "${NNODES:?set it to the number of nodes}"
: "${NODE_RANK:?set it to 0 on the node of RDZV_ENDPOINT and to another number elsewhere}"
: "${RDZV_ENDPOINT:?set it to host:port of one node}"
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Ray reads the token that start_ray.sh used: RAY_AUTH_TOKEN, or its file in the home folder.
export RAY_AUTH_MODE=token

is_host=false
if [[ "$NODE_RANK" == 0 ]]; then
    is_host=true
fi
command=(
    torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "${RANKS:-4}"
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${JOB:-igpo}" --rdzv-conf "is_host=$is_host"
)
if [[ -n "${NODE_IP:-}" ]]; then
    command+=(--local-addr "$NODE_IP")
fi
command+=(-m igpo_megatron.training.main "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "${command[*]}"
    exit 0
fi
exec "${command[@]}"
