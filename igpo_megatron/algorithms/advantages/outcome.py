"""Advantages from one outcome reward per trajectory: every turn of a trajectory gets the same number.

`reinforce_pp` and `reinforce_pp_baseline` set what `whiten` then normalises over all groups of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import ClassVar, Literal

from igpo_megatron.algorithms.advantages.base import AdvantageSection
from igpo_megatron.types import RolloutGroup, Trajectory, UserError

GREEDY_REWARD = "greedy_reward"
"""Key in `RolloutGroup.metrics`: reward of a greedy trajectory of the group's question; nan if it failed for external reasons."""


class Grpo(AdvantageSection):
    """GRPO (arXiv 2402.03300): group z-score of the outcome, the same for every turn."""

    name: Literal["grpo"] = "grpo"
    divide_by_std: bool = True
    """False subtracts the mean only (Dr. GRPO, arXiv 2503.20783)."""

    statistics: Literal["trajectories", "tokens"] = "trajectories"
    """What mean and std are taken over; `tokens` counts every trajectory by its length (HAPO's token-level group average, 2509.16591)."""


class Rloo(AdvantageSection):
    """RLOO (arXiv 2402.14740): outcome minus the mean outcome of the other samples."""

    name: Literal["rloo"] = "rloo"


class Rapo(AdvantageSection):
    """RAPO's advantage scaling (Fathom-DeepResearch, arXiv 2509.24107, eq. 6): GRPO's advantages, times groups per group that differs."""

    name: Literal["rapo"] = "rapo"


class ReinforcePp(AdvantageSection):
    """REINFORCE++ (arXiv 2501.03262): the outcome, whitened over the whole batch."""

    compares_samples: ClassVar[bool] = False

    name: Literal["reinforce_pp"] = "reinforce_pp"


class ReinforcePpBaseline(AdvantageSection):
    """REINFORCE++-baseline (arXiv 2501.03262): outcome minus the mean of its group, whitened over the whole batch."""

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class ReMax(AdvantageSection):
    """ReMax (arXiv 2310.10505): outcome minus that of a greedy trajectory, which is sampled beside the group and not trained."""

    compares_samples: ClassVar[bool] = False
    needs_greedy: ClassVar[bool] = True

    name: Literal["remax"] = "remax"


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


def token_weighted_advantages(rewards: list[float], lengths: list[int], *, divide_by_std: bool = True) -> list[float]:
    """HAPO's token-level group average (arXiv 2509.16591): GRPO with every trajectory counted once per trained token.

    As in the published code, a group in which one of these is 5 or more takes GRPO's instead.
    """
    population = [reward for reward, length in zip(rewards, lengths, strict=True) for _ in range(length)]
    advantages = [*map(zscore(population, divide_by_std=divide_by_std), rewards)]
    if any(abs(advantage) >= 5 for advantage in advantages):
        return grpo_advantages(rewards, divide_by_std=divide_by_std)
    return advantages


def rloo_advantages(rewards: list[float]) -> list[float]:
    """RLOO (arXiv 2402.14740): A_i = r_i - mean(r_j for j != i), one per trajectory of a group; a group of one gets 0."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def grpo(group: RolloutGroup, config: Grpo, progress: float) -> None:
    """Set `turn_advantages` by `grpo_advantages` of the rewards, or by `token_weighted_advantages`."""
    trained = group.trained
    rewards = [trajectory.reward for trajectory in trained]
    if config.statistics == "tokens":
        lengths = [sum(len(node.token_ids) for node in group.actions(trajectory)) for trajectory in trained]
        advantages = token_weighted_advantages(rewards, lengths, divide_by_std=config.divide_by_std)
    else:
        advantages = grpo_advantages(rewards, divide_by_std=config.divide_by_std)
    set_same_for_all_turns(trained, advantages)


def rapo(group: RolloutGroup, config: Rapo, progress: float) -> None:
    """RAPO (Fathom-DeepResearch, arXiv 2509.24107), before `scale_by_informative`: GRPO's advantages."""
    trained = group.trained
    set_same_for_all_turns(trained, grpo_advantages([trajectory.reward for trajectory in trained]))


def scale_by_informative(groups: Sequence[RolloutGroup]) -> None:
    """RAPO (arXiv 2509.24107, eq. 6): A <- A groups / good groups, so that groups without advantages do not dilute the rest.

    A good group is one whose rewards differ; groups without trained trajectories are ignored.
    """
    rewards = [{end.reward for end in group.trained} for group in groups]
    good = sum(len(values) > 1 for values in rewards)
    for group in groups if good else ():
        for trajectory in group.trajectories:
            trajectory.turn_advantages = [value * sum(map(bool, rewards)) / good for value in trajectory.turn_advantages]


def rloo(group: RolloutGroup, config: Rloo, progress: float) -> None:
    """Set `turn_advantages` by `rloo_advantages` of the rewards."""
    trained = group.trained
    set_same_for_all_turns(trained, rloo_advantages([trajectory.reward for trajectory in trained]))


def reinforce_pp(group: RolloutGroup, config: ReinforcePp, progress: float) -> None:
    """REINFORCE++ (arXiv 2501.03262), before `whiten`: A_i = r_i. The paper subtracts a k1 KL estimate from the reward; here it is the
    loss's k3 term, with a weight of its own (`loss.kl_coef`)."""
    trained = group.trained
    set_same_for_all_turns(trained, [trajectory.reward for trajectory in trained])


def reinforce_pp_baseline(group: RolloutGroup, config: ReinforcePpBaseline, progress: float) -> None:
    """REINFORCE++-baseline (arXiv 2501.03262), before `whiten`: A_i = r_i - mean(r). The paper's KL is a term of the loss, too, by k2."""
    trained = group.trained
    set_same_for_all_turns(trained, grpo_advantages([trajectory.reward for trajectory in trained], divide_by_std=False))


def remax(group: RolloutGroup, config: ReMax, progress: float) -> None:
    """ReMax (arXiv 2310.10505): A_i = r_i - r_greedy; zeros if the greedy trajectory failed. Raises UserError if there is none."""
    if GREEDY_REWARD not in group.metrics:
        raise UserError(
            f"group {group.prompt.id} has no greedy trajectory's reward, which advantage.name=remax subtracts; "
            "replay rollouts that were recorded with remax, or choose advantage.name=rloo"
        )
    baseline = group.metrics[GREEDY_REWARD]
    trained = group.trained
    if math.isfinite(baseline):
        set_same_for_all_turns(trained, [trajectory.reward - baseline for trajectory in trained])


def whiten(groups: Sequence[RolloutGroup]) -> None:
    """Normalise all advantages of the step (arXiv 2501.03262): A <- (A - mean) / sqrt(var + 1e-8), statistics over trained tokens.

    The paper's global batch is the step, all groups and ranks together.
    Every trajectory counts its own tokens, so the result does not depend on what trajectories share; a constant becomes 0.
    """
    turns = [
        (trajectory.turn_advantages, [len(node.token_ids) for node in group.actions(trajectory)])
        for group in groups
        for trajectory in group.trained
    ]
    tokens = sum(sum(lengths) for _, lengths in turns)
    if not tokens:
        return

    def mean_over_tokens(value: Callable[[float], float]) -> float:
        weighted = (value(advantage) * n for advantages, lengths in turns for advantage, n in zip(advantages, lengths, strict=True))
        return math.fsum(weighted) / tokens

    mean = mean_over_tokens(lambda advantage: advantage)
    scale = 1.0 / math.sqrt(mean_over_tokens(lambda advantage: (advantage - mean) ** 2) + 1e-8)
    for advantages, _ in turns:
        advantages[:] = [(advantage - mean) * scale for advantage in advantages]


def set_same_for_all_turns(trajectories: list[Trajectory], advantages: list[float]) -> None:
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        trajectory.turn_advantages = [advantage] * len(trajectory.turn_advantages)
