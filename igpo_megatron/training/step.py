"""What a step learns from its groups: log-probs, gains and advantages, then the optimizer steps.

groups ──score_tokens──> old log-probs ──assign_advantages──> turn advantages ──update──> new weights

The main rank has the groups. The other ranks call the same functions without any, and take part in what the policy computes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from igpo_megatron.algorithms.advantages.registry import ADVANTAGES
from igpo_megatron.algorithms.advantages.tree import entropy_stats
from igpo_megatron.algorithms.info_gain import turn_gains
from igpo_megatron.algorithms.settings import Aepo, Bapo, Hapo, Loss, PolicyLoss, Ppo
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.metrics import logprob_gap, routed_share
from igpo_megatron.types import RolloutGroup, UserError

if TYPE_CHECKING:
    from igpo_megatron.packing.experts import ExpertShape
    from igpo_megatron.packing.tree import PackedRow
    from igpo_megatron.policy.policy import Policy


def score_tokens(policy: Policy, groups: Sequence[RolloutGroup]) -> None:
    """Fill old (and reference) log-probs of every action and probe token that has none yet."""
    from igpo_megatron.packing.tree import pack_for_scoring, scatter

    config = policy.config
    experts = replayed_experts(policy)
    pack = partial(pack_for_scoring, groups, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple)
    if takes_engine_logprobs(config):
        for group in groups:
            for node in group.nodes:
                if node.kind == "action":
                    node.old_logprobs = list(node.behavior_logprobs)
    else:
        rows = pack(scorer=config.reward.scorer, experts=experts)
        if isinstance(config.loss, PolicyLoss) and config.loss.uses_old_entropies:
            pairs = policy.log_probs(rows, with_entropy=True)
            scatter(rows, [pair[:, 0] for pair in pairs], groups, "old_logprobs")
            scatter(rows, [pair[:, 1] for pair in pairs], groups, "old_entropies")
        else:
            scatter(rows, policy.log_probs(rows), groups, "old_logprobs")
    if policy.has_reference:
        rows = pack(scorer=None)
        with policy.as_reference():
            scatter(rows, policy.log_probs(rows), groups, "ref_logprobs")


def replayed_experts(policy: Policy) -> ExpertShape | None:
    """Shape of the engine's choices where the policy repeats them; None where its routers choose."""
    from igpo_megatron.packing.experts import ExpertShape

    mixture = policy.shape.mixture
    return ExpertShape(policy.shape.num_layers, mixture.top_k) if mixture and policy.config.rollout.routing_replay else None


def routing_metrics(policy: Policy, groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """With routing replay: `routed_tokens`, and every few steps `logprob_gap`'s names with `_free`, as they would be without replay.

    To be called after `score_tokens`, whose log-probs stay as they are.
    """
    from igpo_megatron.packing.tree import pack_for_scoring, scatter

    if replayed_experts(policy) is None:
        return {}
    config, every = policy.config, policy.config.rollout.routing_gap_every
    metrics = routed_share(groups)
    if not every or (step - 1) % every or takes_engine_logprobs(config):
        return metrics
    copies = [replace(group, nodes=[replace(node) for node in group.nodes]) for group in groups]
    rows = pack_for_scoring(copies, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple, scorer=None)
    scatter(rows, policy.log_probs(rows), copies, "old_logprobs")
    return metrics | {f"{name}_free": value for name, value in logprob_gap(copies).items()}


def takes_engine_logprobs(config: Config) -> bool:
    """No old-log-prob pass is run."""
    return isinstance(config.loss, PolicyLoss) and config.loss.old_logprobs == "engine"


def assign_advantages(groups: Sequence[RolloutGroup], config: Config, progress: float) -> None:
    """Turn gains from the probes' log-probs, then the chosen advantage."""
    advantage = ADVANTAGES[config.advantage.name]
    for group in groups:
        if advantage.needs_probes:
            turn_gains(group, config.reward)
        advantage.function(group, config.advantage, progress)
    if advantage.over_batch:
        advantage.over_batch(groups)


def update(policy: Policy, groups: list[RolloutGroup]) -> dict[str, float]:
    """`optim.minibatches` optimizer steps over the groups; returns their mean metrics.

    A part of which nothing is trained is no step of the optimizer, but one of the schedule, which ends with the run whatever was skipped.
    """
    from igpo_megatron.algorithms.losses import LOSSES, aggregation_of, token_weight
    from igpo_megatron.packing.tree import pack_for_training, step_counts
    from igpo_megatron.policy import parallel
    from igpo_megatron.policy.policy import learning_rate

    config = policy.config
    refuse_shared_turns(groups, config.loss)
    rate = learning_rate(policy.steps_taken, policy.total_steps, config.optim)
    results, empty = [], 0
    for part in minibatches(groups, config.optim.minibatches, key=f"{config.run.seed} {policy.steps_taken}"):
        counts = step_counts(part)
        if isinstance(config.loss, Aepo | Hapo) and config.loss.uses_old_entropies and counts.trained_tokens:
            counts = replace(counts, entropy=entropy_stats(part, config.loss.high_entropy_share))
        counts = parallel.broadcast(counts)
        if not counts.trained_tokens:
            empty += 1
            policy.steps_taken += 1
            continue
        rows = pack_for_training(
            part,
            row_tokens=config.packing.row_tokens,
            multiple=policy.row_multiple,
            token_weight=partial(token_weight, aggregation_of(config.loss)),
            experts=replayed_experts(policy),
        )
        settings = balance_bounds(policy, rows, config.loss) if isinstance(config.loss, Bapo) else config.loss
        loss = partial(LOSSES[config.loss.name], counts=counts, config=settings)
        results.append(policy.train_step(rows, partial(row_loss, loss, config.loss, policy.has_reference)))
    metrics = {"skipped": float(empty + sum(result.skipped for result in results)), "lr": rate}
    if not results:
        return metrics
    metrics["loss"] = sum(result.loss for result in results) / len(results)
    metrics["grad_norm"] = sum(result.grad_norm for result in results) / len(results)
    tokens = sum(result.metrics["tokens"] for result in results)
    names = {"clipped": "clip_fraction", "approx_kl": "kl_old", "ref_kl": "kl_ref", "entropy": "entropy", "nll": "nll"}
    for name, shown in names.items():
        if name in results[0].metrics:
            metrics[shown] = sum(result.metrics[name] for result in results) / max(tokens, 1.0)
    return metrics


def minibatches(groups: Sequence[RolloutGroup], count: int, key: str) -> list[list[RolloutGroup]]:
    """Exactly `count` parts whose sizes differ by one at most, empty ones where there are fewer groups.

    Groups come in an order that tells something of them: those that were sampled in place of others are the last. So they are shuffled
    first, by `key` alone: a resumed run repeats it.
    """
    shuffled = random.Random(key).sample(groups, len(groups))
    ends = [len(groups) * number // count for number in range(count + 1)]
    return [shuffled[start:end] for start, end in itertools.pairwise(ends)]


def balance_bounds(policy: Policy, rows: Sequence[PackedRow], config: Bapo) -> Ppo:
    """BAPO's bounds from the ratios of the whole optimizer step, so that packing cannot change them; one more forward pass.

    They balance the advantages that the loss will train, so those after `loss.mismatch`.
    """
    from igpo_megatron.algorithms.losses import balanced_clip
    from igpo_megatron.policy import parallel

    log_ratios = [now - row.old_logprobs for now, row in zip(policy.log_probs(rows), rows, strict=True)]
    bounds: Ppo = parallel.broadcast(balanced_clip(log_ratios, [trained_advantages(row, config) for row in rows], config) if rows else None)
    return bounds


def refuse_shared_turns(groups: Sequence[RolloutGroup], loss: Loss) -> None:
    """Raise UserError where a loss on whole sequences meets trajectories that share sampled tokens."""
    if not isinstance(loss, PolicyLoss):
        return
    by_mismatch = loss.mismatch == "mask_sequence"
    if (loss.sequence_level or by_mismatch) and any(group.is_branched for group in groups):
        setting = "loss.mismatch=mask_sequence" if by_mismatch else f"loss.name={loss.name}"
        raise UserError(
            f"{setting} judges whole trajectories, but trajectories of this step share sampled turns; "
            "use a loss on tokens such as loss.name=ppo, or rollouts without branches"
        )


def trained_advantages(row: PackedRow, config: Loss) -> Any:
    """[N, 2] advantages of the row's tokens, times what `loss.mismatch` makes of each token."""
    from igpo_megatron.algorithms.losses import mismatch_factor

    if not isinstance(config, PolicyLoss) or config.mismatch == "none":
        return row.advantages
    return row.advantages * mismatch_factor(row.old_logprobs, row.behavior_logprobs, row.sequence, row.sequences, config)[:, None]


def row_loss(loss: Callable[..., Any], config: Loss, with_reference: bool, row: PackedRow, logprobs: Any, entropy: Any) -> Any:
    from igpo_megatron.algorithms.losses import Tokens

    looks_back = isinstance(config, Aepo | Hapo) and config.uses_old_entropies
    tokens = Tokens(
        logprobs=logprobs,
        weight=row.weight,
        advantages=trained_advantages(row, config),
        old_logprobs=row.old_logprobs,
        ref_logprobs=row.ref_logprobs if with_reference else None,
        entropy=entropy,
        old_entropies=row.old_entropies if looks_back else None,
        sequence=row.sequence,
        sequences=row.sequences,
    )
    return loss(tokens)
