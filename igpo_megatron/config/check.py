"""Checks across settings: what one field cannot know, looked at before any process starts. Imports no torch.

Config + world size + config.json of the model ──check──> every problem at once, each saying what was found and what to change

What only the actor can know (which architectures it builds) is checked there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from igpo_megatron.config.load import ConfigError
from igpo_megatron.config.schema import (
    Aepo,
    AepoBranching,
    Bapo,
    Config,
    GainBranching,
    Igpo,
    IgpoLoo,
    NoBranching,
    Parallel,
    PolicyLoss,
    ReinforcePp,
    ReMax,
    Search,
    Sft,
)


def require(config: Config, world_size: int | None, local_world_size: int | None = None) -> None:
    """Raise ConfigError with every problem that `check` finds."""
    problems = check(config, world_size=world_size, local_world_size=local_world_size)
    if problems:
        raise ConfigError(problems)


def check(config: Config, *, world_size: int | None, local_world_size: int | None = None) -> list[str]:
    """Every problem between settings, files and machine; empty when the run may start.

    `world_size`: ranks that train; None where none do (evaluation), which asks only for what engines, search and questions need.
    `local_world_size`: ranks on this machine, `world_size` if None.
    """
    shape = _model_shape(config.model.path)
    if world_size is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"replay": None})})
        return [
            *_model_files(config.model.path),
            *_question_files("data.eval", config.data.eval),
            *_engine_shape(config, shape),
            *_routing(config, shape),
            *_context(config, shape),
            *_devices(config, 0),
            *_search(config),
            *_tools(config),
        ]
    return [
        *_model_files(config.model.path),
        *_training_files(config),
        *_layout(config, world_size),
        *_shape(config, shape),
        *_experts(config, shape, world_size),
        *_engine_shape(config, shape),
        *_routing(config, shape),
        *_context(config, shape),
        *_devices(config, local_world_size or world_size),
        *_search(config),
        *_tools(config),
        *_algorithm(config),
        *_branching(config),
        *_ahead(config),
        *_replay_of_successes(config),
        *_bonus(config),
        *_schedule(config),
    ]


def divisors(number: int) -> list[int]:
    """`divisors(12) == [1, 2, 3, 4, 6, 12]`"""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _needs_engines(config: Config) -> bool:
    return config.run.replay is None


def _evaluates(config: Config) -> bool:
    """A replay starts no engines, so it evaluates nothing."""
    return _needs_engines(config) and bool(config.eval.every or config.eval.at_ends)


def _model_shape(folder: Path) -> dict[str, Any]:
    """config.json of the model; empty where it cannot be read, which `_model_files` reports."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _model_files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield f"model.path={folder}: no such folder; expected a Hugging Face model folder (config.json, *.safetensors, tokenizer)"
        return
    if not (folder / "config.json").is_file():
        yield f"model.path={folder}: no config.json in it; expected a Hugging Face model folder"
    elif not _model_shape(folder):
        yield f"model.path={folder}: config.json is not a JSON object; fetch the model again"
    if not any(folder.glob("*.safetensors")):
        yield f"model.path={folder}: no *.safetensors in it; older checkpoints in other formats must be saved as safetensors first"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        yield f"model.path={folder}: no tokenizer.json or tokenizer_config.json in it; put the model's tokenizer files there"


def _training_files(config: Config) -> Iterator[str]:
    if config.run.replay is not None:
        if not config.run.replay.is_file():
            yield f"run.replay={config.run.replay}: no such file; expected a rollout file (parquet) of an earlier run"
    else:
        yield from _question_files("data.train", config.data.train)
    if _evaluates(config) and not config.data.eval:
        yield "data.eval is empty, but eval.every or eval.at_ends asks for evaluations; name a parquet file, or set both to 0 and false"
    elif config.data.eval:
        yield from _question_files("data.eval", config.data.eval)


def _question_files(key: str, paths: Sequence[Path]) -> Iterator[str]:
    if not paths:
        yield f"{key} is empty; name at least one parquet file of questions (tools/prepare_data.py makes a demo set)"
    for path in paths:
        if not path.is_file():
            yield f"{key}: {path}: no such file"


def _layout(config: Config, world_size: int) -> Iterator[str]:
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


def _shape(config: Config, shape: dict[str, Any]) -> Iterator[str]:
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


def _experts(config: Config, shape: dict[str, Any], world_size: int) -> Iterator[str]:
    layout = config.parallel
    experts = _num_experts(shape)
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


def _num_experts(shape: dict[str, Any]) -> int | None:
    # transformers writes either key, whatever the family.
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    return experts if isinstance(experts, int) else None


def _routing(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    if not config.rollout.routing_replay:
        return
    if shape and _num_experts(shape) is None:
        yield "rollout.routing_replay=true, but the model has no experts to route to; set it to false"
        return
    if config.rollout.max_staleness:
        yield (
            f"rollout.routing_replay=true with rollout.max_staleness={config.rollout.max_staleness}: experts that older weights chose "
            "would be forced on newer ones; set one of them to its default"
        )
    if config.run.device == "cpu" and _needs_engines(config) and not entry_points(group="triton.backends", name="cpu"):
        yield (
            "rollout.routing_replay=true with run.device=cpu: vLLM returns experts from a model runner that needs a Triton with a CPU "
            "back-end (triton-cpu), which is not installed; install it, or set rollout.routing_replay=false"
        )


def _engine_shape(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    heads, engine_tensor = shape.get("num_attention_heads"), config.rollout.engine.tensor
    if _needs_engines(config) and isinstance(heads, int) and heads % engine_tensor:
        yield f"rollout.engine.tensor={engine_tensor} does not divide the model's {heads} attention heads; use one of {divisors(heads)}"


def _context(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    # Recorded rollouts have the lengths they have.
    if not _needs_engines(config):
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


def _devices(config: Config, local_ranks: int) -> Iterator[str]:
    engine, transport = config.rollout.engine, config.sync.transport
    if config.run.device == "cpu" and transport in ("nccl", "ipc"):
        yield f"sync.transport={transport} goes from GPU to GPU, run.device=cpu; use auto"
    if config.run.device != "cpu" and transport == "ipc" and (local_ranks, engine.count, engine.tensor) != (1, 1, 1):
        yield (
            f"sync.transport=ipc joins one rank with one engine on its GPU; there are {local_ranks} ranks and {engine.count} engines "
            f"of tensor={engine.tensor}; use auto or nccl"
        )
    if config.placement.mode == "colocated" and _needs_engines(config):
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
    # A Ray cluster that is joined brings its own GPUs, and its launch script restricted them.
    if engine.ray_address is not None or not _needs_engines(config):
        return
    wanted = engine.count * engine.tensor
    if (engine.gpu_ids or config.run.device == "cuda") and len(set(engine.gpu_ids)) < wanted:
        yield (
            f"rollout.engine: count={engine.count} x tensor={engine.tensor} needs {wanted} GPUs, gpu_ids names {len(set(engine.gpu_ids))}; "
            "name more GPUs, or join a Ray cluster by ray_address"
        )


MOST_RESULTS = {"azure_bing": 50, "google_cse": 10, "tavily": 20, "brave": 20}
"""Results that a web API gives per query at most."""


def _search(config: Config) -> Iterator[str]:
    search = config.search
    if not _needs_engines(config):
        return
    yield from _search_backend(search)
    if search.mode in ("record", "replay") and search.cache is None:
        yield f"search.mode={search.mode} needs search.cache, the SQLite file of recorded answers"
    if search.mode == "replay" and search.cache is not None and not search.cache.is_file():
        yield f"search.cache={search.cache}: no such file; search.mode=replay needs a record, made with search.mode=record"
    if search.deadline_s < search.timeout_s:
        yield f"search.deadline_s={search.deadline_s:g} is less than one attempt (search.timeout_s={search.timeout_s:g}); raise it"
    if search.deadline_s > config.rollout.deadline_s:
        yield (
            f"search.deadline_s={search.deadline_s:g} is more than a whole trajectory has (rollout.deadline_s="
            f"{config.rollout.deadline_s:g}); lower it, or raise rollout.deadline_s"
        )


def _search_backend(search: Search) -> Iterator[str]:
    """What the chosen back-end needs. A replay asks no provider, so it needs no key."""
    match search.backend:
        case "bm25" | "dense" if search.corpus is None:
            yield f"search.backend={search.backend} needs search.corpus, a file of JSON lines {{id, title, text}}"
        case "bm25" | "dense" if search.corpus is not None and not search.corpus.is_file():
            yield f"search.corpus={search.corpus}: no such file; expected JSON lines {{id, title, text}}"
        case "retriever" if not (search.url or "").startswith(("http://", "https://")):
            yield f"search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve; found {search.url!r}"
        case "azure_bing" if search.url is None:
            yield "search.backend=azure_bing needs search.url: Microsoft retired Bing Search v7; name a server that speaks its format"
        case "brightdata" if search.zone is None:
            yield "search.backend=brightdata needs search.zone, the name of your SERP zone"
        case "google_cse" if search.engine_id is None:
            yield "search.backend=google_cse needs search.engine_id, the cx of your programmable search engine"
    if search.backend == "dense" and search.encoder is None:
        yield "search.backend=dense needs search.encoder, a sentence-transformers model such as intfloat/e5-base-v2"
    if search.backend == "dense" and search.mode != "replay" and find_spec("sentence_transformers") is None:
        yield "search.backend=dense needs sentence-transformers, which is not installed; install igpo-megatron[dense]"
    if search.url is not None and search.backend != "retriever" and not search.url.startswith(("http://", "https://")):
        yield f"search.url={search.url!r}: expected an address that begins with http:// or https://"
    if "@" in (search.url or "").partition("://")[2].partition("/")[0]:
        yield "search.url holds a user name or password; addresses are logged, so name its variable by search.api_key_env instead"
    most = MOST_RESULTS.get(search.backend, search.top_k)
    if search.top_k > most:
        yield f"search.top_k={search.top_k}: {search.backend} gives at most {most} results per query; use {most}"
    variable = search.key_variable
    if search.mode == "replay" or variable is None or os.environ.get(variable):
        return
    if search.api_key_env is None:
        yield f"search.backend={search.backend} needs a key in {variable}: that environment variable is not set; export it"
    else:
        yield f"search.api_key_env={variable}: that environment variable is not set; export it, or set search.api_key_env=null"


def _tools(config: Config) -> Iterator[str]:
    rollout, visit = config.rollout, config.visit
    if not _needs_engines(config):
        return
    if rollout.tool_name in ("visit", "python"):
        yield f"rollout.tool_name={rollout.tool_name} is the name of another tool; search needs one of its own, such as search"
    if len(set(rollout.extra_tools)) < len(rollout.extra_tools):
        yield f"rollout.extra_tools={list(rollout.extra_tools)} names a tool more than once; name each once"
    if "visit" not in rollout.extra_tools:
        return
    if visit.max_tokens > rollout.max_observation_tokens and visit.summary.url is None:
        yield (
            f"visit.max_tokens={visit.max_tokens} is more than rollout.max_observation_tokens={rollout.max_observation_tokens}, "
            "so the end of what was chosen from a page would be cut off; lower the first or raise the second"
        )
    for host in visit.allow_hosts:
        if "/" in host or (host.rpartition(":")[2].isdigit() and host.count(":") == 1):
            yield f"visit.allow_hosts: {host!r}: expected a host's name alone, such as wiki.example.org, without http:// and port"
    summary = visit.summary
    if summary.url is not None and not summary.url.startswith(("http://", "https://")):
        yield f"visit.summary.url={summary.url!r}: expected an address such as http://127.0.0.1:8001/v1"
    if summary.url is not None and summary.model is None:
        yield "visit.summary.url needs visit.summary.model, the model's name at that server"
    if summary.url is not None and summary.api_key_env is not None and not os.environ.get(summary.api_key_env):
        yield f"visit.summary.api_key_env={summary.api_key_env}: that environment variable is not set; export it, or set it to null"


def _algorithm(config: Config) -> Iterator[str]:
    reward, advantage = config.reward, config.advantage
    reinforced = isinstance(config.loss, PolicyLoss)
    replayed = config.run.replay is not None
    if isinstance(config.loss, Sft) and not replayed:
        yield "loss.name=sft learns from demonstrations; set run.replay to a file of them"
    if replayed and config.run.stop_after == "rollout":
        yield "run.replay trains from recorded rollouts and run.stop_after=rollout writes new ones; set only one of them"
    samples = config.rollout.samples_per_prompt
    if reinforced and not replayed and samples < 2 and not isinstance(advantage, ReinforcePp | ReMax):
        yield f"rollout.samples_per_prompt={samples}: advantage.name={advantage.name} compares the samples of a question; use 2 or more"
    if reinforced and isinstance(advantage, Igpo | IgpoLoo) and reward.gain == "none":
        yield f"reward.gain=none leaves advantage.name={advantage.name} without gains; measure them, or set advantage.name=grpo"
    if isinstance(config.loss, PolicyLoss):
        yield from _policy_loss(config.loss)
    if reward.overlong is not None and reward.overlong[0] >= reward.overlong[1]:
        yield f"reward.overlong={list(reward.overlong)}: expected [start, end] in tokens with start < end"
    if reward.gain == "none" and reward.scorer != "fold":
        yield f"reward.scorer={reward.scorer} scores probes, reward.gain=none asks for none; leave reward.scorer at its default"
    if reward.evidence and reward.gain == "none":
        yield "reward.evidence=true splits gains, reward.gain=none asks for none; set one of them differently"
    probed = reinforced and isinstance(advantage, Igpo | IgpoLoo) and reward.gain != "none"
    if probed and reward.scorer == "engine":
        yield from _engine_scorer(config)
    elif probed and isinstance(config.loss, PolicyLoss) and config.loss.old_logprobs == "engine":
        yield (
            f"loss.old_logprobs=engine runs no pass that reward.scorer={reward.scorer} could score probes in; "
            "use reward.scorer=engine, or loss.old_logprobs=recompute"
        )
    if isinstance(config.loss, PolicyLoss) and config.loss.uses_old_entropies and config.loss.old_logprobs == "engine":
        without = ", or entropy_advantage=none with balanced_tokens=all" if isinstance(config.loss, Aepo) else ""
        yield (
            f"loss.name={config.loss.name} uses entropies that loss.old_logprobs=engine runs no pass for; "
            f"use old_logprobs=recompute{without}"
        )
    if reward.gain != "none" and reward.probe_template.count("{answer}") != 1:
        found = reward.probe_template.count("{answer}")
        yield f"reward.probe_template={reward.probe_template!r}: expected {{answer}} exactly once, found it {found} times"
    if reinforced and not replayed and config.rollout.temperature == 0:
        yield "rollout.temperature=0 makes all samples of a question alike, so nothing can be learnt; use 1.0 (eval.greedy evaluates at 0)"


def _policy_loss(loss: PolicyLoss) -> Iterator[str]:
    low, high = loss.mismatch_bounds
    if not low < 1 < high:
        yield f"loss.mismatch_bounds={[low, high]}: expected [low, high] around 1, such as [0.5, 2.0]"
    if isinstance(loss, Bapo):
        for name, (first, last) in (("lower", loss.lower), ("upper", loss.upper)):
            if first > last:
                yield f"loss.{name}={[first, last]}: expected [first, last] with first <= last"
        if loss.lower[1] > 1 or loss.upper[0] < 1:
            yield f"loss.lower={list(loss.lower)} and loss.upper={list(loss.upper)}: expected bounds below and above 1"
    if loss.mismatch != "none" and loss.old_logprobs == "engine":
        yield (
            f"loss.mismatch={loss.mismatch} compares the engine with a pass before the step, which loss.old_logprobs=engine leaves out; "
            "use loss.old_logprobs=recompute, or loss.mismatch=none"
        )


def _branching(config: Config) -> Iterator[str]:
    rollout, branching = config.rollout, config.rollout.branching
    if isinstance(branching, NoBranching) or not _needs_engines(config):
        return
    if isinstance(config.loss, PolicyLoss) and config.loss.sequence_level:
        yield (
            f"loss.name={config.loss.name} weighs whole sequences, which cannot be taken apart over the turns that branches share; "
            "use loss.name=ppo, or rollout.branching.name=none"
        )
    premonitored = isinstance(branching, AepoBranching) and branching.premonitor
    if not premonitored and branching.initial_rollouts >= rollout.samples_per_prompt:
        yield (
            f"rollout.branching.initial_rollouts={branching.initial_rollouts} leaves nothing of rollout.samples_per_prompt="
            f"{rollout.samples_per_prompt} to branch with; lower it (published: half), or set rollout.branching.name=none"
        )
    if isinstance(config.loss, PolicyLoss) and config.loss.mismatch == "mask_sequence":
        yield (
            "loss.mismatch=mask_sequence judges whole trajectories, which cannot be taken apart over the turns that branches share; "
            "use loss.mismatch=mask, or rollout.branching.name=none"
        )
    if isinstance(branching, GainBranching):
        yield from _gain_branching(config)
    elif branching.entropy_tokens > rollout.max_tokens_per_turn:
        yield (
            f"rollout.branching.entropy_tokens={branching.entropy_tokens} is more than a turn has "
            f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}); lower it"
        )


def _ahead(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.max_staleness and config.reward.scorer == "engine" and isinstance(config.loss, PolicyLoss):
        yield (
            f"rollout.max_staleness={rollout.max_staleness} lets weights change while a trajectory grows, so that reward.scorer=engine "
            "would take the gains of its turns from different weights; use reward.scorer=fold, or rollout.max_staleness=0"
        )
    if rollout.close_at is None:
        return
    if rollout.close_at > rollout.samples_per_prompt:
        yield (
            f"rollout.close_at={rollout.close_at} is more than rollout.samples_per_prompt={rollout.samples_per_prompt}; "
            "use at most that many, or null to wait for all"
        )
    if not isinstance(rollout.branching, NoBranching):
        yield (
            f"rollout.close_at gives up independent samples, but rollout.branching.name={rollout.branching.name} grows a tree, whose "
            "branches depend on all of them; set rollout.close_at to null"
        )


def _gain_branching(config: Config) -> Iterator[str]:
    found = []
    if not isinstance(config.advantage, Igpo | IgpoLoo):
        found.append(f"advantage.name={config.advantage.name}, which has no probes")
    elif config.reward.gain == "none":
        found.append("reward.gain=none")
    if config.reward.scorer != "engine":
        found.append(f"reward.scorer={config.reward.scorer}, which scores after the rollout")
    if found:
        yield (
            f"rollout.branching.name=gain decides by probes during the rollout; found {' and '.join(found)}; set reward.scorer=engine with "
            "advantage.name=igpo or igpo_loo, or another rollout.branching.name"
        )


def _replay_of_successes(config: Config) -> Iterator[str]:
    if not config.rollout.replay_successes:
        return
    if not isinstance(config.rollout.branching, NoBranching):
        yield (
            f"rollout.replay_successes={config.rollout.replay_successes} replaces single samples, rollout.branching.name="
            f"{config.rollout.branching.name} makes them share turns; use one of them"
        )
    if config.reward.scorer == "engine":
        yield (
            f"rollout.replay_successes={config.rollout.replay_successes} brings samples that no engine has scored probes of in this step; "
            "use reward.scorer=fold"
        )


def _bonus(config: Config) -> Iterator[str]:
    if config.reward.tool_bonus and _needs_engines(config) and "python" not in config.rollout.extra_tools:
        yield (
            f"reward.tool_bonus={config.reward.tool_bonus:g} is for trajectories that search and run python, rollout.extra_tools="
            f"{list(config.rollout.extra_tools)} offers no python; add it, or set reward.tool_bonus=0"
        )


def _engine_scorer(config: Config) -> Iterator[str]:
    if config.run.replay is not None:
        yield "reward.scorer=engine needs engines, run.replay starts none; use reward.scorer=fold"
    if config.rollout.temperature != 1:
        yield (
            f"reward.scorer=engine scores at temperature 1, rollout.temperature={config.rollout.temperature:g}; "
            "use reward.scorer=fold, or rollout.temperature=1"
        )
    if config.reward.evidence:
        yield "reward.evidence=true hides tool results in the trainer's pass; use reward.scorer=fold"


def _schedule(config: Config) -> Iterator[str]:
    optim, steps = config.optim, config.run.steps
    if optim.minibatches > config.rollout.prompts_per_step:
        yield (
            f"optim.minibatches={optim.minibatches} is more than rollout.prompts_per_step={config.rollout.prompts_per_step}: "
            "each optimizer step needs at least one question"
        )
    rollout = config.rollout
    if _needs_engines(config) and config.packing.row_tokens < rollout.max_tokens_per_turn:
        yield (
            f"packing.row_tokens={config.packing.row_tokens} is less than one turn "
            f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}), so turns could not share a row; use a few turns' worth"
        )
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}"
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps={optim.warmup_steps} is more than run.steps={steps}; the peak would never be reached"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas={list(optim.betas)}: expected two numbers from 0 up to, not including, 1"
    if _evaluates(config) and not config.eval.samples and not config.eval.greedy:
        yield "eval.samples=0 and eval.greedy=false leave nothing to evaluate; set one of them"
