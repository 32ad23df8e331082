"""Advantages with one number per turn, from the information gains of the tool turns and the outcome of the answer turn.

gains g_1 .. g_K and outcome o of a trajectory ──normalise over the group──> rewards of turns 1 .. K+1 ──sum over the rest──> A_1 .. A_(K+1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import pstdev
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from igpo_megatron.algorithms.advantages.base import AdvantageSection
from igpo_megatron.algorithms.advantages.outcome import grpo_advantages, zscore
from igpo_megatron.types import RolloutGroup, Trajectory

Gains = list[list[float | None]]
"""Per trajectory the gains of its tool turns; None was not measured and contributes nothing, 0.0 was measured."""

_DEGENERATE_STD = 1e-4
"""igpo_loo: a spread below this says nothing about scale; the published z-score has the same floor, sqrt(1e-8)."""


class Igpo(AdvantageSection):
    """IGPO (arXiv 2510.14967): turn gains and outcome, normalised over the group, summed over the remaining turns."""

    needs_probes: ClassVar[bool] = True

    name: Literal["igpo"] = "igpo"
    normalise: Literal["separate", "joint"] = "separate"
    """z-score gains and outcomes each among themselves (paper) or in one population (code default)."""

    divide_by_std: bool = True
    """False subtracts the mean only."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between; applied after normalisation."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class IgpoLoo(AdvantageSection):
    """IGPO with a leave-one-out baseline per turn index instead of mean subtraction before summing."""

    needs_probes: ClassVar[bool] = True

    name: Literal["igpo_loo"] = "igpo_loo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class Eapo(AdvantageSection):
    """EAPO (IterResearch, arXiv 2511.07327, eq. 5): the outcome discounted per remaining turn, z-scored over all turns of the group.

    Its downsampling to a multiple of the data-parallel size is not needed here: ranks with fewer rows get blank ones.
    """

    name: Literal["eapo"] = "eapo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Discount of the outcome per remaining turn. The paper asks for less than 1 and does not state its value."""


def igpo_turn_advantages(
    gains: list[list[float | None]],
    outcomes: list[float],
    *,
    gamma: float = 1.0,
    normalise: str = "separate",
    divide_by_std: bool = True,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
) -> list[list[float]]:
    """IGPO (arXiv 2510.14967) for the trajectories of one question.

    gains[i] holds the K_i tool turns of trajectory i; the result has K_i + 1 numbers, the answer turn last. With z the group's z-score,
    of gains and outcomes each among themselves (`separate`) or all together (`joint`):

        A_answer = outcome_weight * z(o),    A_k = gain_weight * z(g_k) + gamma * A_(k+1)

    The weights act after the z-score, which would cancel them. Raises ValueError for an unknown `normalise`, unequal lengths or a
    number that is not finite.
    """
    _check_finite_and_aligned(gains, outcomes)
    measured = _measured(gains)
    if normalise == "separate":
        gain_population, outcome_population = measured, outcomes
    elif normalise == "joint":
        gain_population = outcome_population = measured + outcomes
    else:
        raise ValueError(f"normalise={normalise!r} is unknown; use 'separate' or 'joint'")

    z_gain = zscore(gain_population, divide_by_std=divide_by_std)
    z_outcome = zscore(outcome_population, divide_by_std=divide_by_std)
    advantages = []
    for turns, outcome in zip(gains, outcomes, strict=True):
        rewards = [0.0 if gain is None else gain_weight * z_gain(gain) for gain in turns]
        rewards.append(outcome_weight * z_outcome(outcome))
        advantages.append(discounted_returns(rewards, gamma))
    return advantages


def igpo_loo_turn_advantages(
    gains: list[list[float | None]],
    outcomes: list[float],
    *,
    gamma: float = 1.0,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
) -> list[list[float]]:
    """IGPO with a leave-one-out baseline per turn index, for the trajectories of one question; a group of one gets zeros.

    Subtracting the mean gain before summing, as IGPO does, subtracts it once per remaining turn: a baseline that depends on what the
    policy did. Here gains and outcomes are only scaled, by their group standard deviations s_g and s_o (1 where degenerate), and the
    baseline of turn t is the mean return of the other trajectories from turn t, 0 for those already over:

        G_t = sum_(k=t..K) gamma^(k-t) * gain_weight * g_k / s_g + gamma^(K+1-t) * outcome_weight * o / s_o
        A_(i,t) = G_(i,t) - mean(G_(j,t) for j != i)

    Raises ValueError for unequal lengths or a number that is not finite.
    """
    _check_finite_and_aligned(gains, outcomes)
    if len(outcomes) < 2:
        return [[0.0] * (len(turns) + 1) for turns in gains]
    gain_scale = gain_weight / _scale(_measured(gains))
    outcome_scale = outcome_weight / _scale(outcomes)
    returns = [
        discounted_returns([0.0 if gain is None else gain_scale * gain for gain in turns] + [outcome_scale * outcome], gamma)
        for turns, outcome in zip(gains, outcomes, strict=True)
    ]
    longest = max(len(turns) for turns in returns)
    totals = [math.fsum(turns[t] for turns in returns if t < len(turns)) for t in range(longest)]
    return [[value - (total - value) / (len(returns) - 1) for value, total in zip(turns, totals, strict=False)] for turns in returns]


def eapo_turn_advantages(num_turns: list[int], outcomes: list[float], *, gamma: float = 0.95) -> list[list[float]]:
    """EAPO (IterResearch, arXiv 2511.07327, eq. 5 and 7) for the trajectories of one question, of T_i turns each:

        r_(i,t) = gamma^(T_i - t) * o_i,    A_(i,t) = z-score (`grpo_advantages`) of r_(i,t) over all turns of all trajectories

    With outcomes of 0 and 1 a right answer is worth more to the turns of a short trajectory. A negative outcome is discounted, too.
    """
    rewards = [discounted_outcome(turns, outcome, gamma) for turns, outcome in zip(num_turns, outcomes, strict=True)]
    scores = iter(grpo_advantages([reward for turns in rewards for reward in turns]))
    return [[next(scores) for _ in turns] for turns in rewards]


def eapo(group: RolloutGroup, config: Eapo, progress: float) -> None:
    """Set `turn_advantages` by `eapo_turn_advantages`."""
    trained = group.trained
    advantages = eapo_turn_advantages(
        [len(trajectory.turn_advantages) for trajectory in trained], [trajectory.reward for trajectory in trained], gamma=config.gamma
    )
    for trajectory, turns in zip(trained, advantages, strict=True):
        trajectory.turn_advantages = turns


def discounted_returns(rewards: list[float], gamma: float) -> list[float]:
    """R_t = r_t + gamma * R_(t+1). [num_turns] -> [num_turns]"""
    returns: list[float] = []
    following = 0.0
    for reward in reversed(rewards):
        following = reward + gamma * following
        returns.append(following)
    return returns[::-1]


def discounted_outcome(num_turns: int, outcome: float, gamma: float) -> list[float]:
    """gamma^(num_turns - t) * outcome for t = 1 .. num_turns: the returns where nothing but the last turn is rewarded."""
    return discounted_returns([0.0] * (num_turns - 1) + [outcome], gamma)


def igpo(group: RolloutGroup, config: Igpo, progress: float) -> None:
    """Set `turn_advantages` by `igpo_turn_advantages`; `progress` in [0, 1] places the run on its weight schedules."""
    _set_from_gains(group, config, progress, partial(igpo_turn_advantages, normalise=config.normalise, divide_by_std=config.divide_by_std))


def igpo_loo(group: RolloutGroup, config: IgpoLoo, progress: float) -> None:
    """Set `turn_advantages` by `igpo_loo_turn_advantages`; `progress` in [0, 1] places the run on its weight schedules."""
    _set_from_gains(group, config, progress, igpo_loo_turn_advantages)


def _set_from_gains(group: RolloutGroup, config: Igpo | IgpoLoo, progress: float, rule: Callable[..., list[list[float]]]) -> None:
    trained = group.trained
    advantages = rule(
        [_tool_turn_gains(trajectory) for trajectory in trained],
        [trajectory.reward for trajectory in trained],
        gamma=config.gamma,
        gain_weight=interpolate(config.gain_weight, progress),
        outcome_weight=interpolate(config.outcome_weight, progress),
    )
    for trajectory, turns in zip(trained, advantages, strict=True):
        trajectory.turn_advantages = turns


def interpolate(schedule: tuple[float, float], progress: float) -> float:
    """Point on the line from the first step's value (progress 0) to the last step's (progress 1)."""
    first, last = schedule
    return first + (last - first) * progress


def _tool_turn_gains(trajectory: Trajectory) -> list[float | None]:
    """Gains of all turns but the last, which has the outcome instead."""
    assert len(trajectory.gains) == len(trajectory.turn_advantages), (
        f"{len(trajectory.gains)} gains for {len(trajectory.turn_advantages)} turns; call turn_gains first"
    )
    return trajectory.gains[:-1]


def _measured(gains: Gains) -> list[float]:
    return [gain for turns in gains for gain in turns if gain is not None]


def _scale(values: list[float]) -> float:
    """Population standard deviation, 1 where degenerate."""
    std = pstdev(values) if len(values) > 1 else 0.0
    return std if std > _DEGENERATE_STD else 1.0


def _check_finite_and_aligned(gains: Gains, outcomes: list[float]) -> None:
    problems = []
    if len(gains) != len(outcomes):
        problems.append(f"gains of {len(gains)} trajectories but outcomes of {len(outcomes)}; give one list of gains per outcome")
    for name, values in (("gains", _measured(gains)), ("outcomes", outcomes)):
        if bad := [value for value in values if not math.isfinite(value)]:
            problems.append(f"{name} contain {bad[0]}; pass None for a gain that was not measured and a finite number otherwise")
    if problems:
        raise ValueError("; ".join(problems))
