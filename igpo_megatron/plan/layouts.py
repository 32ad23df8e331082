"""Every layout that the trainer would accept for a model on so many ranks, and how many devices train.

The rules are those of policy/settings.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.types import Layout, Machine, Recompute
from igpo_megatron.policy.settings import divisors, stage_layers

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
VIRTUAL = (1, 2, 4)
CONTEXT = (1, 2, 4, 8)
MOST_STAGES = 16
"""Deeper pipelines are not tried: the rows of one step would hardly fill them."""


def stages_of(layers: int, pipeline: int, virtual: int) -> tuple[int, ...] | None:
    """Layers of each stage, as even as the trainer allows, fewer at the ends (embedding, head); None if it allows none."""
    even = stage_layers(layers, pipeline, None, None)
    if even is not None:
        return tuple(even) if not any(number % virtual for number in even) else None
    mean = layers // pipeline
    for less in range(mean):
        for first, last in ((mean - less, mean - less), (mean + 1 - less, mean - less), (mean - less, mean + 1 - less)):
            uneven = stage_layers(layers, pipeline, first, last)
            if uneven is not None and not any(number % virtual for number in uneven) and max(uneven) <= mean + 2:
                return tuple(uneven)
    return None


def tensor_sizes(shape: ModelShape, ranks: int, per_node: int) -> list[int]:
    """Tensor-parallel sizes that divide the model's heads and stay inside a machine."""
    heads = set(divisors(shape.num_heads)) & set(divisors(shape.num_kv_heads))
    return [size for size in sorted(heads) if size <= min(ranks, per_node) and per_node % size == 0 and not 128 % size]


def train_layouts(shape: ModelShape, ranks: int, machine: Machine, row_sizes: tuple[int, ...]) -> Iterator[Layout]:
    """All layouts that use exactly `ranks` ranks."""
    experts = shape.mixture.num_experts if shape.mixture else None
    tensors, pipelines = tensor_sizes(shape, ranks, machine.ranks_per_node), range(1, min(MOST_STAGES, shape.num_layers) + 1)
    for tensor, pipeline, virtual, context in product(tensors, pipelines, VIRTUAL, CONTEXT):
        data, left = divmod(ranks, tensor * pipeline * context)
        stages = stages_of(shape.num_layers, pipeline, virtual)
        if left or (pipeline == 1 and virtual > 1) or stages is None:
            continue
        for expert, recompute, row_tokens in product(_expert_sizes(experts, tensor, ranks // pipeline), RECOMPUTE, row_sizes):
            yield Layout(tensor, pipeline, virtual, context, expert, data, recompute, row_tokens, stages, sequence=tensor > 1)


def _expert_sizes(experts: int | None, tensor: int, stage_ranks: int) -> list[int]:
    if experts is None:
        return [1]
    return [size for size in divisors(experts) if size % tensor == 0 and stage_ranks % size == 0 and size <= 64]


def splits(gpus: int, per_node: int) -> list[int]:
    """How many of `gpus` may train while the others serve rollouts: any number on one machine, complete machines on several."""
    if gpus <= per_node:
        return list(range(1, gpus))
    nodes = gpus // per_node
    step = max(1, nodes // 16)
    return [per_node * number for number in range(step, nodes, step)]
