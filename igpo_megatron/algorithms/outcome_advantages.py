"""Advantages from one outcome reward per trajectory: every turn of a trajectory gets the same number."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from igpo_megatron.config.schema import Grpo, Rloo
from igpo_megatron.types import RolloutGroup, Trajectory


def zscore(population: list[float], *, divide_by_std: bool) -> Callable[[float], float]:
    """value -> (value - mean) / (std + 1e-6), where std = sqrt(population variance + 1e-8) as in the published IGPO code.

    std is 1 for fewer than two values; without `divide_by_std` only the mean is subtracted.
    """
    mean = fmean(population) if population else 0.0
    std = math.sqrt(fmean((value - mean) ** 2 for value in population) + 1e-8) if len(population) > 1 else 1.0
    scale = 1.0 / (std + 1e-6) if divide_by_std else 1.0
    return lambda value: (value - mean) * scale


def grpo_advantages(rewards: list[float], *, divide_by_std: bool = True) -> list[float]:
    """GRPO (arXiv 2402.03300): A_i = (r_i - mean) / (std + 1e-6), one per trajectory of a group; a group of one gets 0.

    std is the population one, as in the IGPO code, so that grpo is igpo without gains; other code divides by n - 1.
    `divide_by_std=False` is Dr. GRPO (arXiv 2503.20783).
    """
    return [*map(zscore(rewards, divide_by_std=divide_by_std), rewards)]


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
