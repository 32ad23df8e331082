"""Ranks, stages, heads and experts divide as the trainer can divide them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from igpo_megatron.config.check.common import divisors, needs_engines, num_experts
from igpo_megatron.config.schema import Config
from igpo_megatron.policy.settings import Parallel


def check_layout(config: Config, world_size: int) -> Iterator[str]:
    """Ranks divide into tensor, context, pipeline and data."""
    layout = config.parallel
    model_ranks = layout.tensor * layout.context * layout.pipeline
    shared = f" x parallel.context={layout.context}" if layout.context > 1 else ""
    product = f"parallel.tensor={layout.tensor}{shared} x parallel.pipeline={layout.pipeline}"
    if layout.sequence and layout.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor of 2 or more; set it to false"
    if config.model.vocab_multiple % layout.tensor:
        yield (
            f"model.vocab_multiple={config.model.vocab_multiple} is no multiple of parallel.tensor={layout.tensor}, "
            f"so the vocabulary cannot be shared evenly; use {config.model.vocab_multiple * layout.tensor}"
        )
    if world_size % model_ranks:
        yield f"{world_size} ranks are no multiple of {product} = {model_ranks}; start a multiple of it, or change the layout"
    elif layout.data is not None and model_ranks * layout.data != world_size:
        yield (
            f"{product} x parallel.data={layout.data} = {model_ranks * layout.data} ranks, but {world_size} were started; "
            f"set parallel.data to {world_size // model_ranks} or null"
        )


def check_heads(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """The model's heads and widths divide over tensor-parallel ranks."""
    heads = shape.get("num_attention_heads")
    key_heads = shape.get("num_key_value_heads") or heads
    layers = shape.get("num_hidden_layers")
    tensor = config.parallel.tensor
    for count, name in ((heads, "attention heads"), (key_heads, "key-value heads")):
        if isinstance(count, int) and count % tensor:
            yield f"parallel.tensor={tensor} does not divide the model's {count} {name}; use one of {divisors(count)}"
            break
    if isinstance(layers, int):
        yield from _stages(config.parallel, layers)


def stage_layers(layers: int, pipeline: int, first: int | None, last: int | None) -> list[int] | None:
    """Layers of each pipeline stage; None where they cannot be shared: `stage_layers(8, 3, 2, None) == [2, 3, 3]`."""
    if pipeline == 1:
        return [layers]
    given = [number for number in (first, last) if number is not None]
    others, left = pipeline - len(given), layers - sum(given)
    if left < others or (left % others if others else left):
        return None
    ends = [number if number is not None else left // others for number in (first, last)]
    return [ends[0], *[left // others if others else 0] * (pipeline - 2), ends[1]]


def _stages(layout: Parallel, layers: int) -> Iterator[str]:
    first, last, chunks = layout.first_stage_layers, layout.last_stage_layers, layout.virtual_pipeline
    uneven = first is not None or last is not None
    if layout.pipeline == 1 and (uneven or chunks > 1):
        yield (
            f"parallel.pipeline=1 leaves nothing to split, but parallel.virtual_pipeline={chunks}, first_stage_layers={first}, "
            f"last_stage_layers={last}; raise parallel.pipeline, or leave the others at their defaults"
        )
        return
    stages = stage_layers(layers, layout.pipeline, first, last)
    if stages is None and not uneven:
        yield (
            f"parallel.pipeline={layout.pipeline} does not divide the model's {layers} layers; use one of {divisors(layers)}, "
            "or set parallel.first_stage_layers and parallel.last_stage_layers"
        )
    elif stages is None:
        yield (
            f"parallel.first_stage_layers={first} and last_stage_layers={last} leave layers of the model's {layers} that its other "
            f"pipeline stages (parallel.pipeline={layout.pipeline}) cannot share evenly, at least one each; change one of them"
        )
    elif any(number % chunks for number in stages):
        yield f"parallel.virtual_pipeline={chunks} does not divide every pipeline stage's layers, {stages}; use a common divisor of them"


def check_experts(config: Config, shape: dict[str, Any], world_size: int) -> Iterator[str]:
    """Experts divide over their ranks."""
    layout = config.parallel
    experts = num_experts(shape)
    if experts is None:
        if layout.expert > 1 and shape:
            yield f"parallel.expert={layout.expert}, but the model has no experts; set it to 1"
        return
    if experts % layout.expert:
        yield f"parallel.expert={layout.expert} does not divide the model's {experts} experts; use one of {divisors(experts)}"
    if layout.tensor > 1 and not layout.sequence:
        yield f"parallel.tensor={layout.tensor} with experts needs sequence parallelism; set parallel.sequence=true"
    if layout.expert % layout.tensor:
        yield (
            f"parallel.expert={layout.expert} is no multiple of parallel.tensor={layout.tensor}, but experts are spread over "
            f"tensor-parallel ranks first; use {layout.tensor * max(1, layout.expert // layout.tensor)}"
        )
    elif (world_size // layout.pipeline) % layout.expert:
        yield (
            f"parallel.expert={layout.expert} does not divide the {world_size // layout.pipeline} ranks of a pipeline stage; "
            f"set parallel.data to a multiple of {layout.expert // math.gcd(layout.expert, layout.tensor * layout.context)}"
        )


def check_routing(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """Routing can be replayed."""
    if not config.rollout.routing_replay:
        return
    if shape and num_experts(shape) is None:
        yield "rollout.routing_replay=true, but the model has no experts to route to; set it to false"
        return
    if config.rollout.max_staleness:
        yield (
            f"rollout.routing_replay=true with rollout.max_staleness={config.rollout.max_staleness}: experts that older weights chose "
            "would be forced on newer ones; set one of them to its default"
        )
    if config.run.device == "cpu" and needs_engines(config) and not entry_points(group="triton.backends", name="cpu"):
        yield (
            "rollout.routing_replay=true with run.device=cpu: vLLM returns experts from a model runner that needs a Triton with a CPU "
            "back-end (triton-cpu), which is not installed; install it, or set rollout.routing_replay=false"
        )
