#!/usr/bin/env bash
# Run this node's part of a job: the same command on every node, and again the same to resume.
#
#   examples/launch.sh CONFIG.yaml                                                            one node, bound to loopback
#   NNODES=2 NODE_RANK=0 IGPO_HEAD=10.0.0.1 examples/launch.sh CONFIG.yaml                    two nodes, ranks and engines on both
#   NNODES=2 NODE_RANK=1 IGPO_HEAD=10.0.0.1 examples/launch.sh CONFIG.yaml
#   NNODES=3 NODE_RANK=2 IGPO_HEAD=10.0.0.1 NODE_ROLE=rollout examples/launch.sh CONFIG.yaml  a node of engines only
#
# NNODES          nodes (default 1)
# NODE_RANK       0 on the node of IGPO_HEAD; 1, 2, ... elsewhere
# IGPO_HEAD       host[:port] of node 0 (port 29400: meeting point; 29401: Ray; 29402: static rendezvous)
# NODE_ROLE       train, rollout or both (default)
# RANKS           ranks on this node (default: an equal share of the layout)
# NODE_IP         address of this node that the others reach (default: that of the route to node 0)
# RENDEZVOUS      c10d (default) or static
# MAX_RESTARTS    times that torchrun restarts dead ranks from the last checkpoint (default 0)
# RAY_AUTH_TOKEN  secret shared by all nodes; one node alone makes its own
# DRY_RUN         any value: print the command instead of running it
#
# It starts Ray and torchrun's agent on this node and stops what it started. run.folder is on storage that all nodes share.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: [NNODES=.. NODE_RANK=.. IGPO_HEAD=host:port] $0 CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

command=(igpo launch "$@" --rendezvous "${RENDEZVOUS:-c10d}" --max-restarts "${MAX_RESTARTS:-0}")
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "${command[*]}"
    exit 0
fi
exec "${command[@]}"
