#!/usr/bin/env bash
# Start Ray on this node for the engines and show it only the engines' GPUs. Stays until interrupted; stops only what it started.
#
#   ENGINE_GPUS=4,5,6,7 examples/start_ray.sh head                                            one node: loopback only
#   ENGINE_GPUS=4,5,6,7 NODE_IP=10.0.0.1 examples/start_ray.sh head                           first of several nodes
#   ENGINE_GPUS=4,5,6,7 NODE_IP=10.0.0.2 RAY_HEAD=10.0.0.1:6379 examples/start_ray.sh worker  each other node
#
# ENGINE_GPUS     devices of the engines, not those of the ranks, counted among those of CUDA_VISIBLE_DEVICES if set; empty for none
# NODE_IP         address of this node that the others reach (default 127.0.0.1, which they cannot)
# RAY_HEAD        worker: address that the head printed
# PORT            head: its port (default 6379)
# RAY_AUTH_TOKEN  secret shared by all nodes (default: Ray's token file in the home folder, made if missing; share it or copy it)
# DRY_RUN         any value: print the command instead of running it
set -euo pipefail

role="${1:-}"
if [[ "$role" != head && "$role" != worker ]]; then
    echo "usage: [ENGINE_GPUS=4,5,6,7] [NODE_IP=..] [RAY_HEAD=host:port] $0 head|worker" >&2
    exit 2
fi
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
node_ip="${NODE_IP:-127.0.0.1}"
IFS=, read -ra gpus <<<"${ENGINE_GPUS:-}"
devices="${ENGINE_GPUS:-}"
if [[ -n "${CUDA_VISIBLE_DEVICES+set}" && -n "$devices" ]]; then
    # A scheduler gave this job some GPUs of the node: other numbers are other jobs'.
    IFS=, read -ra given <<<"$CUDA_VISIBLE_DEVICES"
    devices=""
    for gpu in "${gpus[@]}"; do
        if [[ ! "$gpu" =~ ^[0-9]+$ || -z "${given[10#$gpu]:-}" ]]; then
            echo "ENGINE_GPUS=$ENGINE_GPUS counts among CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, which has no number $gpu" >&2
            exit 2
        fi
        devices+="${devices:+,}${given[10#$gpu]}"
    done
fi
export CUDA_VISIBLE_DEVICES="$devices"
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
if [[ "$node_ip" == 127.* ]]; then
    # Ray replaces a loopback address by the machine's own and listens on every interface, unless it takes the machine for a desktop.
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi

command=(ray start --block --node-ip-address "$node_ip" --num-gpus "${#gpus[@]}" --disable-usage-stats)
if [[ "$role" == head ]]; then
    address="$node_ip:${PORT:-6379}"
    command+=(--head --port "${PORT:-6379}" --include-dashboard false)
else
    address="${RAY_HEAD:?set it to the address that the head printed}"
    command+=(--address "$address")
fi
if [[ -n "${DRY_RUN:-}" ]]; then
    printf 'CUDA_VISIBLE_DEVICES=%s %s\n' "$CUDA_VISIBLE_DEVICES" "${command[*]}"
    exit 0
fi

if [[ "$role" == head && -z "${RAY_AUTH_TOKEN:-}" ]]; then
    ray get-auth-token --generate >/dev/null
fi
"${command[@]}" &
ray_pid=$!
trap 'kill -TERM "$ray_pid" 2>/dev/null || true; wait "$ray_pid" || true' EXIT
trap 'exit 130' INT TERM
echo "Ray $role on $node_ip, engines' GPUs: ${ENGINE_GPUS:-none}; train with rollout.engine.ray_address=$address"
wait "$ray_pid"
