"""Advantages from one outcome reward per trajectory: every turn of a trajectory gets the same number."""

from __future__ import annotations

import math
from statistics import fmean

from igpo_megatron.config.schema import Grpo, Rloo
from igpo_megatron.types import RolloutGroup, Trajectory

_VARIANCE_FLOOR = 1e-8
_STD_FLOOR = 1e-6


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Mean and sqrt(population variance + 1e-8) as in the published IGPO code; the latter is 1 for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else 0.0), 1.0
    mean = fmean(values)
    return mean, math.sqrt(fmean((value - mean) ** 2 for value in values) + _VARIANCE_FLOOR)


def zscore(value: float, population: list[float], *, divide_by_std: bool) -> float:
    """(value - mean) / (std + 1e-6) under `mean_and_std` of the population; only the mean is subtracted without `divide_by_std`."""
    mean, std = mean_and_std(population)
    return (value - mean) / (std + _STD_FLOOR) if divide_by_std else value - mean


def grpo_advantages(rewards: list[float], *, divide_by_std: bool = True) -> list[float]:
    """GRPO (arXiv 2402.03300): A_i = (r_i - mean) / (std + 1e-6), one per trajectory of a group; a group of one gets 0.

    std is the population one, as in the IGPO code, so that grpo is igpo without gains; other code divides by n - 1.
    `divide_by_std=False` is Dr. GRPO (arXiv 2503.20783).
    """
    return [zscore(reward, rewards, divide_by_std=divide_by_std) for reward in rewards]


def rloo_advantages(rewards: list[float]) -> list[float]:
    """RLOO (arXiv 2402.14740): A_i = r_i - mean(r_j for j != i), one per trajectory of a group; a group of one gets 0."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def trained_trajectories(group: RolloutGroup) -> list[Trajectory]:
    """Trajectories that enter the group's statistics: trainable, with at least one turn. All others get zero advantages here."""
    trained = []
    for trajectory in group.trajectories:
        trajectory.turn_advantages = [0.0] * len(group.actions(trajectory))
        if trajectory.status.is_trainable and trajectory.turn_advantages:
            trained.append(trajectory)
    return trained


def grpo(group: RolloutGroup, config: Grpo, progress: float) -> None:
    """Set `turn_advantages` by `grpo_advantages` of the rewards."""
    trained = trained_trajectories(group)
    _set_same_for_all_turns(trained, grpo_advantages([trajectory.reward for trajectory in trained], divide_by_std=config.divide_by_std))


def rloo(group: RolloutGroup, config: Rloo, progress: float) -> None:
    """Set `turn_advantages` by `rloo_advantages` of the rewards."""
    trained = trained_trajectories(group)
    _set_same_for_all_turns(trained, rloo_advantages([trajectory.reward for trajectory in trained]))


def _set_same_for_all_turns(trajectories: list[Trajectory], advantages: list[float]) -> None:
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        trajectory.turn_advantages = [advantage] * len(trajectory.turn_advantages)
