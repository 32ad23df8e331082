"""Send the policy's weights to the engines, and check after every transfer that they arrived.

    Megatron shards ──gather over TP (experts: EP)──> full tensor ──PP stages in turn──> rule backwards, HF names ──> WeightSink

The canary scores fixed tokens on both sides: a stale, swapped or half-loaded weight shows as a log-prob gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoint_conversion.architectures import rules_for
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import Rule
from igpo_megatron.config.schema import Config
from igpo_megatron.packing.tree import pack_for_scoring
from igpo_megatron.policy import parallel
from igpo_megatron.policy.model import global_names, tensor_shards
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import Canary, Node, Prompt, RolloutGroup, Status, SyncError, Trajectory, WeightSink


@torch.no_grad()
def named_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights under their Hugging Face names, one at a time. Collective: every rank iterates, the main rank gets the tensors.

    Other ranks receive the same names with tensors that only they hold; use those of the main rank.
    """
    ranks = policy.ranks
    rules = rules_for(policy.shape, policy.config.model.vocab_multiple)
    held = dict(global_names(policy.chunks))
    sizes = {name: parameter.nbytes for name, parameter in held.items()}
    stages: list[dict[str, int]] = [sizes]
    if ranks.pipeline_size > 1:
        stages = [{} for _ in range(ranks.pipeline_size)]
        dist.all_gather_object(stages, sizes, group=parallel_state.get_pipeline_model_parallel_group())
    sent: set[str] = set()
    for stage, names in enumerate(stages):
        here = stage == ranks.pipeline_rank
        for batch in batches([rules[name] for name in names], names, policy.config.sync.bucket_mib * 2**20 // ranks.expert_size):
            if sent.issuperset(name for rule in batch for name in rule.exports):  # tied head, or the embedding's copy on the last stage
                continue
            parameters = [held[rule.megatron_name] for rule in batch] if here else None
            for parts, full in _full_tensors(batch, rules, parameters, policy):
                full = _to_first_stage(full, stage, policy)
                sent.update(name for part in parts for name in part.exports)
                if full is not None:
                    for part, tensor in zip(parts, full, strict=True):
                        yield from zip(part.exports, part.to_hf(tensor), strict=True)


def batches(rules: Sequence[Rule], sizes: Mapping[str, int], most_bytes: int) -> Iterator[list[Rule]]:
    """Rules whose tensors travel together, each rule once: experts of one layer and kind in batches of `most_bytes`, others alone.

    `sizes`: bytes of each rule's tensor. A mixture has tens of thousands of experts' tensors: one collective for each would spend all
    its time waiting.
    """
    alike: dict[str, list[Rule]] = {}
    for rule in rules:
        alike.setdefault(rule.megatron_name if rule.expert is None else _of_expert(rule, 0), []).append(rule)
    for kind in alike.values():
        count = max(1, most_bytes // max(1, sizes[kind[0].megatron_name]))
        yield from (kind[start : start + count] for start in range(0, len(kind), count))


def _full_tensors(
    batch: Sequence[Rule], rules: dict[str, Rule], parameters: Sequence[torch.Tensor] | None, policy: Policy
) -> Iterator[tuple[list[Rule], torch.Tensor | None]]:
    """(rules, their full tensors stacked) of what this stage's ranks hold under the batch's names; for experts once per expert rank.

    `parameters` None: the tensors lie on another pipeline stage, and only the rules are given.
    """
    first = batch[0]
    if first.expert is None:
        group = parallel_state.get_tensor_model_parallel_group()
        yield [first], None if parameters is None else first.unshard(_gather(parameters[0], tensor_shards(first), group))[None]
        return
    # Every rank holds a range of equally many experts. A batch and its counterparts on the other ranks travel together.
    assert policy.shape.mixture is not None
    ranks = policy.ranks
    held = policy.shape.mixture.num_experts // ranks.expert_size
    group = parallel_state.get_expert_model_parallel_group()
    gathered = None if parameters is None else _gather(torch.stack([part.detach() for part in parameters]), ranks.expert_size, group)
    for rank in range(ranks.expert_size):
        owned = [rules[_of_expert(rule, rank * held + (rule.expert or 0) % held)] for rule in batch]
        yield owned, None if gathered is None else gathered[rank]


def _of_expert(rule: Rule, expert: int) -> str:
    """The name of another expert's tensor of the same kind."""
    return rule.megatron_name.replace(f".local_experts.{rule.expert}.", f".local_experts.{expert}.")


def _gather(parameter: torch.Tensor, size: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The parts that the `size` ranks of `group` hold, in rank order."""
    parameter = parameter.detach()
    if size == 1:
        return [parameter]
    parts = [torch.empty_like(parameter) for _ in range(size)]
    dist.all_gather(parts, parameter.contiguous(), group=group)
    return parts


def _to_first_stage(full: torch.Tensor | None, stage: int, policy: Policy) -> torch.Tensor | None:
    """Move a stage's tensors to the first stage of its pipeline; None on the stages in between."""
    ranks = policy.ranks
    if stage == 0:
        return full if ranks.pipeline_rank == 0 else None
    group = parallel_state.get_pipeline_model_parallel_group()
    members = dist.get_process_group_ranks(group)
    if ranks.pipeline_rank == stage:
        assert full is not None
        full = full.contiguous()
        dist.send_object_list([(tuple(full.shape), full.dtype)], dst=members[0], group=group)
        dist.send(full, dst=members[0], group=group)
        return None
    if ranks.pipeline_rank == 0:
        box: list[tuple[tuple[int, ...], torch.dtype] | None] = [None]
        dist.recv_object_list(box, src=members[stage], group=group)
        assert box[0] is not None
        shape, dtype = box[0]
        buffer = torch.empty(shape, dtype=dtype, device=ranks.device)
        dist.recv(buffer, src=members[stage], group=group)
        return buffer
    return None


def push(
    policy: Policy, sink: WeightSink | None, version: int, canary: Canary | None = None, exported: Callable[[], None] | None = None
) -> dict[str, float]:
    """Send all weights to `sink` as `version`; the sink's metrics, on the main rank. Collective; only the main rank gives a `sink`.

    `exported` is called on every rank, once, when the last tensor has left; it may be collective itself.
    """
    weights = named_weights(policy)
    calls = [exported] if exported is not None else []

    def all_left() -> None:
        while calls:
            calls.pop()()

    metrics: dict[str, float] = {}
    if sink is not None:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[policy.config.model.dtype]
        complete = checked(weights, expected_tensors(policy), dtype, version)
        metrics = dict(sink.update_weights(complete, version, canary, all_left))
    for _ in weights:  # other ranks walk along; on the main rank the sink has consumed everything
        pass
    all_left()
    parallel.broadcast(None)
    return metrics


def expected_tensors(policy: Policy) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of all tensors of a complete export, by the conversion rules and the headers of the model's folder."""
    reader = HfReader(policy.config.model.path)
    rules = rules_for(policy.shape, policy.config.model.vocab_multiple)
    return {name: reader.shape(name) for rule in rules.values() for name in rule.exports}


def checked(
    named_tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype, version: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, checked to be a complete model: every expected name once, in its shape, as `dtype`. Raises SyncError."""
    missing = dict(expected)
    for name, tensor in named_tensors:
        if name not in missing:
            raise SyncError(f"sync {version} exports {name}, which {'it did already' if name in expected else 'the model does not have'}")
        if tuple(tensor.shape) != missing.pop(name):
            raise SyncError(f"sync {version} exports {name} of shape {list(tensor.shape)}; the model has {list(expected[name])}")
        if tensor.dtype != dtype:
            raise SyncError(f"sync {version} exports {name} as {tensor.dtype}; the policy is {dtype}")
        yield name, tensor
    if missing:
        raise SyncError(
            f"sync {version} exports {len(expected) - len(missing)} of {len(expected)} tensors; {next(iter(missing))} is missing"
        )


def gap_allowed(config: Config) -> float:
    """|Log-prob difference| on the canary between policy and engine: `sync.max_gap`, or what their dtypes may differ by."""
    return config.sync.gap_for(*_dtypes(config))


def _dtypes(config: Config) -> tuple[str, str]:
    """Of policy and engine."""
    return config.model.dtype, config.rollout.engine.dtype_for(config.model.dtype)


def canary_group(vocab_size: int, num_tokens: int, seed: int) -> RolloutGroup:
    """A fixed pseudo-random sequence as a rollout group: one prompt token, then the tokens that are scored."""
    generator = torch.Generator().manual_seed(seed)
    return scoring_group(torch.randint(0, vocab_size, (num_tokens + 1,), generator=generator).tolist())


def scoring_group(tokens: list[int]) -> RolloutGroup:
    """Tokens as a rollout group: the first is the prompt, the others are scored."""
    nodes = [Node(None, "prompt", tokens[:1]), Node(0, "action", tokens[1:], turn=1)]
    return RolloutGroup(Prompt("canary", "", (), "canary"), nodes, [Trajectory([0, 1], Status.FINISHED)])


def make_canary(policy: Policy) -> Canary | None:
    """Fixed tokens, and the policy's raw log-probs (temperature 1) of them, on the main rank; None on the others. Collective."""
    config = policy.config
    group = canary_group(policy.shape.vocab_size, config.sync.canary_tokens, config.run.seed)
    rows = pack_for_scoring([group], row_tokens=len(group.context(1)), multiple=policy.row_multiple)
    found = policy.log_probs(rows, temperature=1.0)
    if not found:
        return None
    return Canary(tuple(group.context(1)), tuple(found[0].tolist()), gap_allowed(config), rounded="bf16" in _dtypes(config))
