"""Advantages and statistics for groups whose trajectories share turns; a flat group is a tree in which none are shared."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Literal

from igpo_megatron.algorithms.advantages.base import AdvantageSection
from igpo_megatron.algorithms.advantages.outcome import set_same_for_all_turns
from igpo_megatron.types import EntropyStats, RolloutGroup, Trajectory


class Arpo(AdvantageSection):
    """ARPO (arXiv 2507.19849, section 3.2): group z-score of the outcome, on trees."""

    name: Literal["arpo"] = "arpo"
    attribution: Literal["soft", "hard"] = "soft"
    """A turn that several trajectories share is trained with the advantage of each (soft, published) or with their mean (hard)."""


def arpo_advantages(rewards: list[float]) -> list[float]:
    """A_i = (r_i - mean) / (std + 1e-6), std with n - 1 as in the published code (verl's GRPO); a group of one gets 0."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    mean, std = fmean(rewards), stdev(rewards)
    return [(reward - mean) / (std + 1e-6) for reward in rewards]


def arpo(group: RolloutGroup, config: Arpo, progress: float) -> None:
    """ARPO (arXiv 2507.19849, section 3.2): `arpo_advantages` of the rewards, for every turn; see `hard_attribution`.

    Soft attribution needs nothing else: a shared token has one ratio and is trained with each of its trajectories' advantages, which
    packing adds up, positive and negative parts apart.
    """
    trained = group.trained
    advantages = arpo_advantages([trajectory.reward for trajectory in trained])
    set_same_for_all_turns(trained, advantages)
    if config.attribution == "hard":
        hard_attribution(group, trained)


def hard_attribution(group: RolloutGroup, trained: list[Trajectory]) -> None:
    """Give a turn that d trajectories share the mean of their d advantages (ARPO, "hard" estimation; absent from its code)."""
    actions = [[index for index in trajectory.path if group.nodes[index].kind == "action"] for trajectory in trained]
    shared: dict[int, list[float]] = {}
    for trajectory, indices in zip(trained, actions, strict=True):
        for index, advantage in zip(indices, trajectory.turn_advantages, strict=True):
            shared.setdefault(index, []).append(advantage)
    for trajectory, indices in zip(trained, actions, strict=True):
        trajectory.turn_advantages = [fmean(shared[index]) for index in indices]


def entropy_stats(groups: list[RolloutGroup], high_share: float) -> EntropyStats:
    """Statistics of the old entropies of a step's trained tokens, independent of packing; `high_share` of them exceed the threshold.

    A token counts once for every trajectory through it, so that sharing changes nothing.
    """
    trained = [(group, end) for group in groups for end in group.trained]
    values = sorted(entropy for group, end in trained for node in group.actions(end) for entropy in node.old_entropies)
    assert values, "entropies of the policy before the step were not taken"
    spread = stdev(values) if len(values) > 1 else 0.0
    above = math.ceil(len(values) * high_share)
    threshold = values[-above - 1] if above < len(values) else -math.inf
    return EntropyStats(fmean(values), spread or 1.0, threshold, lowest=values[0], highest=values[-1])
