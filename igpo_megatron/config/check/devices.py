"""Engines fit their model, their context and the devices that are left to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from igpo_megatron.config.check.common import divisors, needs_engines
from igpo_megatron.config.schema import Config


def check_engine_heads(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """The model's heads divide over an engine's devices."""
    heads, engine_tensor = shape.get("num_attention_heads"), config.rollout.engine.tensor
    if needs_engines(config) and isinstance(heads, int) and heads % engine_tensor:
        yield f"rollout.engine.tensor={engine_tensor} does not divide the model's {heads} attention heads; use one of {divisors(heads)}"


def check_context(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """A question and a turn fit the context."""
    # Recorded rollouts have the lengths they have.
    if not needs_engines(config):
        return
    rollout = config.rollout
    longest = shape.get("max_position_embeddings")
    if isinstance(longest, int) and rollout.max_context > longest:
        yield f"rollout.max_context={rollout.max_context} is more than the model's max_position_embeddings={longest}; use at most {longest}"
    probe = config.reward.probe_max_tokens if config.reward.gain != "none" else 0
    needed = rollout.max_tokens_per_turn + probe
    if needed >= rollout.max_context:
        yield (
            f"rollout.max_context={rollout.max_context} leaves no room for a question: one turn (rollout.max_tokens_per_turn="
            f"{rollout.max_tokens_per_turn}) and a probe ({probe}) take {needed}; raise max_context or shorten the turn"
        )


def _colocated(config: Config, local_ranks: int) -> Iterator[str]:
    engine, wanted = config.rollout.engine, config.rollout.engine.count * config.rollout.engine.tensor
    if config.rollout.max_staleness:
        yield (
            f"placement.mode=colocated lets ranks and engines take turns, but rollout.max_staleness={config.rollout.max_staleness} lets "
            "engines roll out while the ranks train; use placement.mode=disaggregated, or rollout.max_staleness=0"
        )
    if engine.gpu_ids:
        yield (
            f"rollout.engine.gpu_ids={list(engine.gpu_ids)} gives the engines GPUs of their own, which placement.mode=colocated does not; "
            "leave it empty, or use placement.mode=disaggregated"
        )
    if config.run.device != "cpu" and engine.ray_address is None and wanted > local_ranks:
        yield (
            f"placement.mode=colocated has the GPUs of the {local_ranks} ranks on this machine, but rollout.engine.count={engine.count} x "
            f"tensor={engine.tensor} needs {wanted}; use at most {local_ranks}"
        )


def check_devices(config: Config, local_ranks: int) -> Iterator[str]:
    """Ranks and engines have devices, and reach each other."""
    engine, transport = config.rollout.engine, config.sync.transport
    if config.run.device == "cpu" and transport in ("nccl", "ipc"):
        yield f"sync.transport={transport} goes from GPU to GPU, run.device=cpu; use auto"
    if config.run.device != "cpu" and transport == "ipc" and (local_ranks, engine.count, engine.tensor) != (1, 1, 1):
        yield (
            f"sync.transport=ipc joins one rank with one engine on its GPU; there are {local_ranks} ranks and {engine.count} engines "
            f"of tensor={engine.tensor}; use auto or nccl"
        )
    if config.placement.mode == "colocated" and needs_engines(config):
        yield from _colocated(config, local_ranks)
        return
    if config.run.device == "cpu":
        if engine.gpu_ids:
            yield f"rollout.engine.gpu_ids={list(engine.gpu_ids)} with run.device=cpu; leave it empty, or set run.device=cuda"
        return
    repeated = sorted({gpu for gpu in engine.gpu_ids if engine.gpu_ids.count(gpu) > 1})
    if repeated:
        yield f"rollout.engine.gpu_ids names {repeated} more than once; name each GPU once"
    shared = sorted(set(engine.gpu_ids) & set(range(local_ranks)))
    if shared and transport != "ipc":
        yield (
            f"rollout.engine.gpu_ids={list(engine.gpu_ids)} overlaps the GPUs of the {local_ranks} ranks on this machine, "
            f"which take 0 to {local_ranks - 1}; give the engines GPUs from {local_ranks} on"
        )
    # A Ray cluster that is joined brings its own GPUs, and its launch script restricted them; backend=torch has the main rank's.
    if engine.ray_address is not None or engine.backend == "torch" or not needs_engines(config):
        return
    wanted = engine.count * engine.tensor
    if (engine.gpu_ids or config.run.device == "cuda") and len(set(engine.gpu_ids)) < wanted:
        yield (
            f"rollout.engine: count={engine.count} x tensor={engine.tensor} needs {wanted} GPUs, gpu_ids names {len(set(engine.gpu_ids))}; "
            "name more GPUs, or join a Ray cluster by ray_address"
        )
