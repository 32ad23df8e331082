"""Checks that involve several rooms, made before any process starts. Imports no torch.

Config + world size + config.json of the model ──check──> every problem at once, each saying what was found and what to change

Checks of one section are in its `problems`, checks of one room in the room's settings.py; only the policy knows which architectures it
builds.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from igpo_megatron.algorithms.advantages.registry import ADVANTAGES
from igpo_megatron.algorithms.settings import algorithm_problems
from igpo_megatron.config.schema import Config
from igpo_megatron.policy.settings import divisors, layout_problems, num_experts
from igpo_megatron.settings import Section, is_hook


def check(config: Config, *, world_size: int | None, local_world_size: int | None = None) -> list[str]:
    """Every problem between settings, files and machine; empty when the run may start.

    `world_size`: ranks that train; None for an evaluation, which checks only engines, search and questions.
    `local_world_size`: ranks on this machine, `world_size` if None.
    """
    if world_size is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"replay": None})})
    shape = config.model.shape()
    found = [problem for section in _sections(config, trains=world_size is not None) for problem in _own(section)]
    if needs_engines(config):
        found += [*_engines(config, shape), *_tools(config)]
    found += [*_routing(config, shape), *_devices(config, local_world_size or world_size or 0)]
    if world_size is None:
        return [*found, *config.data.missing("eval")]
    found += [
        *_questions(config),
        *layout_problems(config.model, config.parallel, world_size),
        *algorithm_problems(config.reward, config.advantage, config.loss),
        *_algorithm(config),
        *_schedule(config),
    ]
    return [*found, *(_groups(config) if needs_engines(config) else ())]


def needs_engines(config: Config) -> bool:
    """Whether rollouts are generated, not replayed from a file."""
    return config.run.replay is None


def evaluates(config: Config) -> bool:
    """Whether the run evaluates; a replay starts no engines, so it does not."""
    return needs_engines(config) and config.eval.wanted


def planned_over_steps(config: Config) -> list[str]:
    """Settings by which what a step does depends on run.steps: with another number, the steps so far would have been others."""
    optim, advantage = config.optim, config.advantage
    found = [f"optim.decay={optim.decay}"] if optim.decay != "constant" else []
    if config.loss.learns_from_rewards:
        weights = advantage.model_dump(include={"gain_weight", "outcome_weight"})
        found += [f"advantage.{name}={[first, last]}" for name, (first, last) in weights.items() if first != last]
        found += [f"advantage.name={advantage.name} (it is given its progress)"] if is_hook(advantage.name) else []
    return found


def _sections(config: Config, *, trains: bool) -> Iterator[Section]:
    """The sections that the run uses."""
    unused = {"visit", "python"} - set(config.rollout.extra_tools)
    if not trains:
        unused |= {"parallel", "reward", "advantage", "loss", "optim", "eval"}
    if not needs_engines(config):
        unused |= {"search", "rollout", "visit", "python", "eval"}
    yield from (getattr(config, name) for name in Config.model_fields if name not in unused)


def _own(section: Section) -> Iterator[str]:
    """Problems of a section and of the sections in it."""
    yield from section.problems()
    for _, value in section:
        if isinstance(value, Section):
            yield from _own(value)


def _questions(config: Config) -> Iterator[str]:
    """The files of training and evaluation exist."""
    if needs_engines(config):
        yield from config.data.missing("train")
    if evaluates(config) and not config.data.eval:
        yield "data.eval is empty, but eval.every or eval.at_ends asks for evaluations; name a parquet file, or set both to 0 and false"
    elif config.data.eval:
        yield from config.data.missing("eval")


def _engines(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """Engines fit the model, and a question and a turn fit its context."""
    rollout, engine = config.rollout, config.rollout.engine
    heads, longest = shape.get("num_attention_heads"), shape.get("max_position_embeddings")
    if isinstance(heads, int) and heads % engine.tensor:
        yield f"rollout.engine.tensor={engine.tensor} does not divide the model's {heads} attention heads; use one of {divisors(heads)}"
    if isinstance(longest, int) and rollout.max_context > longest:
        yield f"rollout.max_context={rollout.max_context} is more than the model's max_position_embeddings={longest}; use at most {longest}"
    probe = config.reward.probe_max_tokens if config.reward.gain != "none" else 0
    needed = rollout.max_tokens_per_turn + probe
    if needed >= rollout.max_context:
        yield (
            f"rollout.max_context={rollout.max_context} leaves no room for a question: one turn (rollout.max_tokens_per_turn="
            f"{rollout.max_tokens_per_turn}) and a probe ({probe}) take {needed}; raise max_context or shorten the turn"
        )
    if engine.backend != "torch":
        return
    if rollout.routing_replay:
        yield "rollout.routing_replay=true with rollout.engine.backend=torch, which returns no experts; set it to false, or use vllm"
    if config.sync.transport not in ("auto", "shared_memory"):
        yield f"sync.transport={config.sync.transport} with rollout.engine.backend=torch, which takes weights where they are; use auto"
    sizes = (shape.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    cache = rollout.max_context, config.model.dtype, shape
    if all(isinstance(size, int) for size in sizes) and not engine.cache_slots(*cache):
        need = -(-engine.sequence_bytes(*cache) // 2**20)
        yield (
            f"rollout.engine.kv_cache_mib={engine.kv_cache_mib} is too small for backend=torch: one sequence of rollout.max_context="
            f"{rollout.max_context} takes {need} MiB; set it to a multiple of that, or lower rollout.max_context"
        )


def _tools(config: Config) -> Iterator[str]:
    """Search and visits fit a trajectory."""
    rollout, search, visit = config.rollout, config.search, config.visit
    if search.deadline_s > rollout.deadline_s:
        yield (
            f"search.deadline_s={search.deadline_s:g} is more than a complete trajectory has (rollout.deadline_s="
            f"{rollout.deadline_s:g}); lower it, or raise rollout.deadline_s"
        )
    if "visit" in rollout.extra_tools and visit.summary.url is None and visit.max_tokens > rollout.max_observation_tokens:
        yield (
            f"visit.max_tokens={visit.max_tokens} is more than rollout.max_observation_tokens={rollout.max_observation_tokens}, "
            "so the end of a page's excerpt would be cut off; lower the first or raise the second"
        )


def _routing(config: Config, shape: dict[str, Any]) -> Iterator[str]:
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


def _devices(config: Config, local_ranks: int) -> Iterator[str]:
    """Ranks and engines have devices, and can reach each other."""
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


def _algorithm(config: Config) -> Iterator[str]:
    """The run provides what the loss needs."""
    reward, loss = config.reward, config.loss
    if config.model.head_backward == "in_forward" and (setting := loss.looks_beyond_a_token):
        yield (
            f"{setting} makes a token's loss depend on other tokens, which model.head_backward=in_forward has not seen when it forms the "
            "token's gradient; use model.head_backward=recompute"
        )
    held_out, replay = loss.held_out_loss, config.run.replay
    if held_out is not None and replay is not None and held_out.file.resolve() == replay.resolve():
        yield f"loss.held_out={held_out.file} is the file of run.replay, so what it measures is trained on; split the demonstrations"
    engine_scores = reward.scorer == "engine" and reward.gain != "none" and config.advantage.needs_probes and loss.learns_from_rewards
    if engine_scores and not needs_engines(config):
        yield "reward.scorer=engine needs engines, run.replay starts none; use reward.scorer=fold"
    if engine_scores and reward.probe_temperature == "sampling" and config.rollout.temperature != 1:
        yield (
            "reward.scorer=engine scores at temperature 1, the only one at which vLLM does, reward.probe_temperature=sampling asks for "
            f"rollout.temperature={config.rollout.temperature:g}; use reward.scorer=fold, or reward.probe_temperature=1"
        )


def _groups(config: Config) -> Iterator[str]:
    """Groups grow as they are asked to, and can be trained so."""
    rollout, reward, advantage, loss = config.rollout, config.reward, config.advantage, config.loss
    yield from rollout.group_problems()
    if not loss.learns_from_rewards:
        yield f"loss.name={loss.name} learns from demonstrations; set run.replay to a file of them"
    else:
        if rollout.samples_per_prompt < 2 and advantage.compares_samples:
            yield (
                f"rollout.samples_per_prompt={rollout.samples_per_prompt}: advantage.name={advantage.name} compares the samples of a "
                "question; use 2 or more"
            )
        if rollout.temperature == 0:
            yield "rollout.temperature=0 makes all samples of a question alike: nothing can be learnt; use 1.0 (eval.greedy evaluates at 0)"
        if rollout.max_staleness and reward.scorer == "engine":
            yield (
                f"rollout.max_staleness={rollout.max_staleness} lets weights change while a trajectory grows, so that reward.scorer=engine "
                "would take the gains of its turns from different weights; use reward.scorer=fold, or rollout.max_staleness=0"
            )
    if rollout.branching.branches and (setting := loss.judges_trajectories):
        remedy = "loss.mismatch=mask" if setting.startswith("loss.mismatch") else "loss.name=ppo"
        yield (
            f"{setting} judges whole trajectories, which cannot be taken apart over the turns that branches share; "
            f"use {remedy}, or rollout.branching.name=none"
        )
    if rollout.branching.decides_by_gain:
        yield from _gains_while_growing(config)
    if rollout.replay_successes and reward.scorer == "engine":
        yield (
            f"rollout.replay_successes={rollout.replay_successes} brings samples that no engine has scored probes of in this step; "
            "use reward.scorer=fold"
        )
    if reward.tool_bonus and "python" not in rollout.extra_tools:
        yield (
            f"reward.tool_bonus={reward.tool_bonus:g} is for trajectories that search and run python, rollout.extra_tools="
            f"{list(rollout.extra_tools)} offers no python; add it, or set reward.tool_bonus=0"
        )


def _gains_while_growing(config: Config) -> Iterator[str]:
    found = []
    if not config.advantage.needs_probes:
        found.append(f"advantage.name={config.advantage.name}, which has no probes")
    elif config.reward.gain == "none":
        found.append("reward.gain=none")
    if config.reward.scorer != "engine":
        found.append(f"reward.scorer={config.reward.scorer}, which scores after the rollout")
    with_probes = [name for name, entry in ADVANTAGES.items() if entry.section.needs_probes]
    if found:
        yield (
            f"rollout.branching.name=gain decides by probes during the rollout; found {' and '.join(found)}; set reward.scorer=engine with "
            f"advantage.name={' or '.join(with_probes)}, or another rollout.branching.name"
        )


def _schedule(config: Config) -> Iterator[str]:
    """Rows, batches and the learning rate make sense for so many steps."""
    optim, rollout, steps = config.optim, config.rollout, config.run.steps
    if optim.minibatches > rollout.prompts_per_step:
        yield (
            f"optim.minibatches={optim.minibatches} is more than rollout.prompts_per_step={rollout.prompts_per_step}: "
            "each optimizer step needs at least one question"
        )
    if needs_engines(config) and config.packing.row_tokens < rollout.max_tokens_per_turn:
        yield (
            f"packing.row_tokens={config.packing.row_tokens} is less than one turn "
            f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}), so turns could not share a row; use a few turns' worth"
        )
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps={optim.warmup_steps} is more than run.steps={steps}; the peak would never be reached"
    elif optim.warmup_steps == steps and optim.decay != "constant":
        yield f"optim.warmup_steps={steps} is all of run.steps, which leaves none for optim.decay={optim.decay}; warm up for fewer"
