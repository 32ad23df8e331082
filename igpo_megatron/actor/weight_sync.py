"""Carry the policy's weights to whoever serves them, and prove after every transfer that they arrived.

    Megatron shards ──gather over TP──> full tensor ──rule backwards──> HF names ──PP stages in turn──> main rank ──> WeightSink

The canary scores fixed tokens on both sides: a stale, swapped or half-loaded weight shows as a log-prob gap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from checkpoint_conversion.architectures import rules_for
from igpo_megatron.actor import parallel
from igpo_megatron.actor.model import global_names
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
    group = parallel_state.get_tensor_model_parallel_group()
    held = dict(global_names(policy.module))
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
            full = None
            if stage == ranks.pipeline_rank:
                parameter = held[name].detach()
                shards = [parameter]
                if rule.split_dim is not None and ranks.tensor_size > 1:
                    shards = [torch.empty_like(parameter) for _ in range(ranks.tensor_size)]
                    dist.all_gather(shards, parameter.contiguous(), group=group)
                full = rule.unshard(shards)
            full = _to_first_stage(full, stage, policy)
            sent.update(rule.exports)
            if full is not None:
                yield from zip(rule.exports, rule.to_hf(full), strict=True)


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
        gap = max(abs(left - right) for left, right in zip(policy_logprobs, served, strict=True))
        if not gap <= max_gap:
            raise SyncError(
                f"engine {number} does not serve the policy's weights: after sync {version} their log-probs differ by up to {gap:.3g} "
                f"on the canary, more than sync.max_gap={max_gap:g}; a transfer was lost or the engine kept old weights"
            )
        worst = max(worst, gap)
    return worst
