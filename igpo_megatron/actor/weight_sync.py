"""Carry the policy's weights to whoever serves them, and prove after every transfer that they arrived.

    Megatron shards ──gather over TP (experts: EP)──> full tensor ──PP stages in turn──> rule backwards, HF names ──> WeightSink

The canary scores fixed tokens on both sides: a stale, swapped or half-loaded weight shows as a log-prob gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoint_conversion.architectures import rules_for
from checkpoint_conversion.rules import Rule
from igpo_megatron.actor import parallel
from igpo_megatron.actor.model import global_names, tensor_shards
from igpo_megatron.actor.policy import Policy
from igpo_megatron.packing.tree import pack_for_scoring
from igpo_megatron.types import Node, Prompt, RolloutGroup, RunStopped, Status, Trajectory, WeightSink


class SyncError(RunStopped):
    """Engines and policy disagree after a weight transfer."""


@torch.no_grad()
def named_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights under their Hugging Face names, one at a time; collective: every rank iterates, the main rank gets the tensors.

    Other ranks receive the same names with tensors that only they hold; use the main rank's.
    """
    ranks = policy.ranks
    rules = rules_for(policy.shape, policy.config.model.vocab_multiple)
    held = dict(global_names(policy.chunks))
    stages: list[list[str]] = [list(held)]
    if ranks.pipeline_size > 1:
        stages = [[] for _ in range(ranks.pipeline_size)]
        dist.all_gather_object(stages, list(held), group=parallel_state.get_pipeline_model_parallel_group())
    sent: set[str] = set()
    for stage, names in enumerate(stages):
        for name in names:
            rule = rules[name]
            if sent.issuperset(rule.exports):  # tied head, or the embedding's copy on the last stage
                continue
            here = stage == ranks.pipeline_rank
            for part, full in _full_tensors(rule, rules, held.get(name) if here else None, policy):
                full = _to_first_stage(full, stage, policy)
                sent.update(part.exports)
                if full is not None:
                    yield from zip(part.exports, part.to_hf(full), strict=True)


def _full_tensors(
    rule: Rule, rules: dict[str, Rule], parameter: torch.Tensor | None, policy: Policy
) -> Iterator[tuple[Rule, torch.Tensor | None]]:
    """(rule, full tensor) of what this stage's ranks hold under the rule's name: one tensor, or each expert-parallel rank's expert.

    `parameter` None: the tensor lies on another pipeline stage, and only the rules are given.
    """
    if rule.expert is None:
        size = tensor_shards(rule)
        yield rule, None if parameter is None else rule.unshard(_gather(parameter, size, parallel_state.get_tensor_model_parallel_group()))
        return
    # Every rank holds a range of as many experts: this one and its like on the other ranks travel together.
    assert policy.shape.mixture is not None
    ranks = policy.ranks
    held = policy.shape.mixture.num_experts // ranks.expert_size
    owned = [rules[_of_expert(rule, rank * held + rule.expert % held)] for rank in range(ranks.expert_size)]
    group = parallel_state.get_expert_model_parallel_group()
    tensors = [None] * len(owned) if parameter is None else _gather(parameter, ranks.expert_size, group)
    yield from zip(owned, tensors, strict=True)


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
    """Move a stage's tensor to the first stage of its pipeline; None on the stages in between."""
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


def push(policy: Policy, sink: WeightSink | None, version: int) -> None:
    """Send all weights to `sink` as `version`. Collective; `sink` is given on the main rank only."""
    weights = named_weights(policy)
    problem = None
    if sink is not None:
        try:
            sink.update_weights(weights, version)
        except RunStopped as error:
            problem = error
    for _ in weights:  # other ranks walk along; on the main rank the sink has consumed everything, or failed
        pass
    parallel.raise_together(problem)


def canary_group(vocab_size: int, num_tokens: int, seed: int) -> RolloutGroup:
    """A fixed pseudo-random sequence as a rollout group: one prompt token, then the tokens that are scored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (num_tokens + 1,), generator=generator).tolist()
    return scoring_group(tokens)


def scoring_group(tokens: list[int]) -> RolloutGroup:
    """Tokens as a rollout group: the first is the prompt, the others are scored."""
    nodes = [Node(None, "prompt", tokens[:1]), Node(0, "action", tokens[1:], turn=1)]
    return RolloutGroup(Prompt("canary", "", (), "canary"), nodes, [Trajectory([0, 1], Status.FINISHED)])


def canary_logprobs(policy: Policy, group: RolloutGroup) -> list[float]:
    """The policy's raw log-probs (temperature 1) of the canary's tokens, on every rank."""
    rows = pack_for_scoring([group], row_tokens=len(group.context(1)), multiple=policy.row_multiple)
    return policy.log_probs(rows, temperature=1.0)[0].tolist()


def check_canary(policy_logprobs: list[float], engine_logprobs: list[list[float]], max_gap: float, version: int) -> float:
    """Largest |log-prob difference| over all engines. Raises SyncError above `max_gap`."""
    worst = 0.0
    for number, served in enumerate(engine_logprobs):
        gaps = [abs(left - right) for left, right in zip(policy_logprobs, served, strict=True)]
        gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max() would lose a nan
        if not gap <= max_gap:
            raise SyncError(
                f"engine {number} does not serve the policy's weights: after sync {version} their log-probs differ by up to {gap:.3g} "
                f"on the canary, more than sync.max_gap={max_gap:g}; a transfer was lost or the engine kept old weights"
            )
        worst = max(worst, gap)
    return worst
