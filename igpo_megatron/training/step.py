"""The stages of a step: log-probs, gains and advantages, then what each optimizer step trains on.

groups ──score_tokens──> old log-probs ──assign_advantages──> turn advantages ──minibatches──> rows and their objective
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from igpo_megatron.algorithms.advantages.registry import set_advantages
from igpo_megatron.algorithms.advantages.tree import entropy_stats
from igpo_megatron.algorithms.info_gain import turn_gains
from igpo_megatron.algorithms.losses.registry import Loss
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.metrics import logprob_gap, rollout_metrics, routed_share
from igpo_megatron.training.queue import staleness_metrics
from igpo_megatron.types import Metric, RolloutGroup, UserError, without_replay

if TYPE_CHECKING:
    from igpo_megatron.packing.tree import ExpertShape, PackedRow
    from igpo_megatron.policy.policy import Policy, StepResult
    from igpo_megatron.policy.schedule import Objective


def score_tokens(policy: Policy, groups: Sequence[RolloutGroup]) -> None:
    """Fill old (and reference) log-probs of every action and probe token that has none yet."""
    from igpo_megatron.packing.tree import pack_for_scoring, per_node

    config = policy.config
    experts = replayed_experts(policy)
    pack = partial(
        pack_for_scoring, groups, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple, ranks=policy.ranks.data_size
    )
    if config.loss.skips_old_logprobs:
        for group in groups:
            for node in group.nodes:
                if node.kind == "action":
                    node.old_logprobs = list(node.behavior_logprobs)
    else:
        rows = pack(scorer=config.reward.scorer, experts=experts)
        found = policy.log_probs(rows, with_entropy=config.loss.uses_old_entropies)
        if config.loss.uses_old_entropies:
            for node, entropies in per_node(rows, [pair[:, 1] for pair in found], groups):
                node.old_entropies = entropies
            found = [pair[:, 0] for pair in found]
        for node, logprobs in per_node(rows, found, groups):
            node.old_logprobs = logprobs
    if policy.has_reference:
        rows = pack(scorer=None)
        with policy.as_reference():
            for node, logprobs in per_node(rows, policy.log_probs(rows), groups):
                node.ref_logprobs = logprobs


def replayed_experts(policy: Policy) -> ExpertShape | None:
    """Shape of the engine's choice of experts where the policy replays it; None where its own routers choose."""
    from igpo_megatron.packing.tree import ExpertShape

    mixture = policy.shape.mixture
    return ExpertShape(policy.shape.num_layers, mixture.top_k) if mixture and policy.config.rollout.routing_replay else None


def routing_metrics(policy: Policy, groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """With routing replay: `routed_tokens`, and every few steps `logprob_gap`'s names with `_free`, as they would be without replay.

    Call it after `score_tokens`, whose log-probs it leaves unchanged.
    """
    from igpo_megatron.packing.tree import pack_for_scoring, per_node

    if replayed_experts(policy) is None:
        return {}
    config, every = policy.config, policy.config.rollout.routing_gap_every
    metrics = routed_share(groups)
    if not every or (step - 1) % every or config.loss.skips_old_logprobs:
        return metrics
    copies = [replace(group, nodes=[replace(node) for node in group.nodes]) for group in groups]
    rows = pack_for_scoring(copies, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple, scorer=None)
    for node, logprobs in per_node(rows, policy.log_probs(rows), copies):
        node.old_logprobs = logprobs
    return metrics | {without_replay(name): value for name, value in logprob_gap(copies).items()}


def assign_advantages(groups: Sequence[RolloutGroup], config: Config, progress: float) -> None:
    """Turn gains from the probes' log-probs, then the chosen advantage."""
    if config.advantage.needs_probes:
        for group in groups:
            turn_gains(group, config.reward)
    set_advantages(groups, config.advantage, progress)


def minibatches(policy: Policy, groups: list[RolloutGroup]) -> Iterator[tuple[list[PackedRow], Objective]]:
    """Rows and objective of each of the step's `optim.minibatches` optimizer steps, one after the other.

    A part without trained tokens takes no optimizer step, but it counts in the learning-rate schedule, which ends with the run in any case.
    """
    from igpo_megatron.algorithms.losses.registry import objective, token_weight
    from igpo_megatron.packing.tree import pack_for_training, step_counts
    from igpo_megatron.policy import parallel

    config = policy.config
    loss = config.loss
    refuse_shared_turns(groups, loss)
    for part in shuffled_parts(groups, config.optim.minibatches, key=f"{config.run.seed} {policy.steps_taken}"):
        counts = step_counts(part)
        if loss.entropy_share is not None and counts.trained_tokens:
            counts = replace(counts, entropy=entropy_stats(part, loss.entropy_share))
        counts = parallel.broadcast(counts)
        if not counts.trained_tokens:
            policy.steps_taken += 1
            continue
        rows = pack_for_training(
            part,
            row_tokens=config.packing.row_tokens,
            multiple=policy.row_multiple,
            token_weight=partial(token_weight, loss.aggregation),
            experts=replayed_experts(policy),
            ranks=policy.ranks.data_size,
        )
        counts = replace(counts, bounds=bounds_of_step(policy, rows, loss))
        yield rows, partial(objective, counts=counts, config=loss)


def bounds_of_step(policy: Policy, rows: Sequence[PackedRow], loss: Loss) -> tuple[float, float] | None:
    """`StepCounts.bounds` for a loss that needs them, from all rows of the optimizer step, so that packing cannot change them; else None.

    They balance the advantages that the loss trains, that is, those after `loss.mismatch`. This costs one more forward pass.
    """
    from igpo_megatron.algorithms.losses.registry import entry_of, trained_advantages
    from igpo_megatron.policy import parallel
    from igpo_megatron.policy.schedule import tokens_of

    find = entry_of(loss).bounds
    if find is None:
        return None
    tokens = [tokens_of(row, now) for now, row in zip(policy.log_probs(rows), rows, strict=True)]
    ratios, advantages = [one.log_ratio for one in tokens], [trained_advantages(one, loss) for one in tokens]
    bounds: tuple[float, float] = parallel.broadcast(find(ratios, advantages, loss) if tokens else None)
    return bounds


def shuffled_parts(groups: Sequence[RolloutGroup], count: int, key: str) -> list[list[RolloutGroup]]:
    """Exactly `count` parts whose sizes differ by one at most, empty ones where there are fewer groups.

    The order of the groups is not random: those that were sampled in place of others come last. So they are shuffled first. The shuffle
    depends on `key` alone, so a resumed run repeats it.
    """
    shuffled = random.Random(key).sample(groups, len(groups))
    ends = [len(groups) * number // count for number in range(count + 1)]
    return [shuffled[start:end] for start, end in itertools.pairwise(ends)]


def refuse_shared_turns(groups: Sequence[RolloutGroup], loss: Loss) -> None:
    """Raise UserError where a loss on whole sequences meets trajectories that share sampled tokens."""
    if loss.judges_trajectories and any(group.is_branched for group in groups):
        raise UserError(
            f"{loss.judges_trajectories} judges whole trajectories, but trajectories of this step share sampled turns; "
            "use a loss on tokens such as loss.name=ppo, or rollouts without branches"
        )


def group_metrics(groups: Sequence[RolloutGroup], config: Config, step: int) -> dict[str, float]:
    """Metrics of a step's groups; if they are trained on, also their staleness and the gap between engine and policy."""
    metrics = rollout_metrics(groups)
    if config.run.stop_after != "none":
        return metrics
    if config.run.replay is None:
        metrics |= staleness_metrics(groups, step)
    return metrics | logprob_gap(groups, step - 1 if config.run.replay is None else None)


def update_metrics(policy: Policy, results: Sequence[StepResult]) -> dict[str, float]:
    """Means over the optimizer steps of one step, and over their tokens; the learning rate is that of the first."""
    from igpo_megatron.policy.policy import learning_rate

    optim = policy.config.optim
    empty = optim.minibatches - len(results)
    metrics: dict[str, float] = {
        Metric.SKIPPED: float(empty + sum(result.skipped for result in results)),
        Metric.LR: learning_rate(policy.steps_taken - optim.minibatches, policy.total_steps, optim),
    }
    if not results:
        return metrics
    metrics[Metric.LOSS] = sum(result.loss for result in results) / len(results)
    metrics[Metric.GRAD_NORM] = sum(result.grad_norm for result in results) / len(results)
    tokens = sum(result.metrics[Metric.TRAINED_TOKENS] for result in results)
    for name in (name for name in results[0].metrics if name != Metric.TRAINED_TOKENS):
        metrics[name] = sum(result.metrics[name] for result in results) / max(tokens, 1.0)
    return metrics
