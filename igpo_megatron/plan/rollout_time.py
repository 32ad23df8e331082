"""Seconds of a rollout on engines that decode many trajectories at once while others wait for their tools.

Every trajectory alternates between sampling a turn and waiting for a tool. All that sample on one engine advance together, one token per
decoding step, and a step of B of them takes `step_seconds(B)`: weights and keys read once, the FLOPs, and a fixed cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.asynchronous import Setup, Simulation
from igpo_megatron.plan.machines import GIB
from igpo_megatron.plan.parts import active_parameters, count_parts, total_parameters
from igpo_megatron.plan.types import Engines, Machine, Workload
from igpo_megatron.plan.workload import Draw, draw

RESERVED = 3 * 2**30
"""Bytes that an engine keeps on a GPU for activations, graphs and buffers."""

MAX_SEQUENCES = 256


def simulate(trajectories: Sequence[Draw], concurrent: int, step_seconds: Callable[[int], float]) -> list[float]:
    """When trajectories end, in order, on one engine that takes `concurrent` of them at once; those that wait for a tool keep their place.

    One trajectory of n tokens and no tools ends after exactly n * step_seconds(1).
    """
    simulation = Simulation(Setup(lambda step: trajectories, 1, concurrent, step_seconds, 0.0, 0.0, staleness=0, steps=1, warm_up=0))
    simulation.run()
    return simulation.finished


def pace_of(shape: ModelShape, machine: Machine, workload: Workload, tensor: int, dtype_bytes: int) -> Callable[[int], float]:
    """How fast an engine of `tensor` devices decodes: seconds of a step in which so many trajectories get a token each."""
    mixture = shape.mixture
    # Bytes that every step reads on each device: weights, of which a small batch leaves some experts asleep, and a trajectory's keys.
    weights = total_parameters(shape) * dtype_bytes / tensor
    experts = shape.num_layers * count_parts(shape, 1, 1).layer_experts * dtype_bytes / tensor if mixture else 0.0
    missed = 1 - mixture.top_k / mixture.num_experts if mixture else 0.0  # chance that one token leaves an expert out
    keys = _key_bytes(shape, tensor, dtype_bytes) * mean_tokens(workload) / 2
    token_flops = 2.0 * active_parameters(shape) / tensor
    # However small a step is. Two small all-reduces in every layer, which engines do by kernels of their own.
    fixed = machine.decode_call + (2 * shape.num_layers * machine.link_latency / 3 if tensor > 1 else 0.0)

    def seconds(batch: int) -> float:
        read = weights - experts * missed**batch + batch * keys
        flops = batch * token_flops
        return max(read / machine.stream, flops / machine.matmul_rate(flops)) + fixed

    return seconds


def mean_tokens(workload: Workload) -> float:
    """Of a trajectory at its end."""
    trajectories = draw(workload)
    return sum(one.tokens for one in trajectories) / len(trajectories)


def _key_bytes(shape: ModelShape, tensor: int, dtype_bytes: int) -> float:
    """Of one token's keys and values on each device; where there are fewer key heads than devices, each holds a copy."""
    return 2.0 * shape.num_layers * max(1, shape.num_kv_heads // tensor) * shape.head_dim * dtype_bytes


def serve(
    shape: ModelShape, machine: Machine, workload: Workload, count: int, tensor: int, utilisation: float, dtype_bytes: int = 2
) -> Engines | str:
    """`count` engines of `tensor` devices each, or the reason why such an engine cannot run."""
    weights = total_parameters(shape) * dtype_bytes / tensor
    keys = _key_bytes(shape, tensor, dtype_bytes)
    room = machine.memory * utilisation - weights - (RESERVED if machine.device == "cuda" else 0)
    cache = int(room / keys)
    if cache < workload.max_context:
        return (
            f"engine TP{tensor}: {weights / GIB:.1f} GiB of weights leave {max(room, 0) / GIB:.1f} GiB for keys and values, one "
            f"trajectory of {workload.max_context} tokens needs {workload.max_context * keys / GIB:.1f} GiB; use larger engines"
        )
    concurrent = max(1, min(MAX_SEQUENCES, int(cache / mean_tokens(workload))))
    share = draw(workload)[::count]
    ends = simulate(share, concurrent, pace_of(shape, machine, workload, tensor, dtype_bytes))
    # Prompts (once for a group) and tool results are read in large batches, at the rate of training.
    read = sum(one.prompt / workload.samples + sum(one.observed) for one in share)
    flops = 2.0 * active_parameters(shape) / tensor * read
    straggler = ends[-1] - ends[int(0.9 * (len(ends) - 1))]
    return Engines(count, tensor, ends[-1] + flops / machine.matmul_rate(flops), weights, cache, cache * keys, concurrent, straggler)
