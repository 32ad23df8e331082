"""GiGPO (arXiv 2505.10978): compare a turn with other turns that were taken in exactly the same state.

sample 1:  question ── search A ── [passages P] ── answer      states of a group that are equal form an anchor group:
sample 2:  question ── search B ── [passages P] ── search C    {question: 2 visits}, {passages P: 2 visits}
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from igpo_megatron.algorithms.advantages.base import AdvantageSection
from igpo_megatron.algorithms.advantages.outcome import grpo_advantages
from igpo_megatron.algorithms.advantages.turn import discounted_outcome
from igpo_megatron.types import RolloutGroup, Trajectory


class GiGpo(AdvantageSection):
    """GiGPO (arXiv 2505.10978): group z-score of the outcome plus that of the discounted outcome among visits of the same state."""

    name: Literal["gigpo"] = "gigpo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Discount of the outcome per remaining turn, for the comparison within a state."""

    step_weight: NonNegativeFloat = 1.0
    """Weight of the comparison within a state."""

    divide_by_std: bool = True
    """False subtracts means only, in both parts."""


def gigpo_turn_advantages(
    states: list[list[Hashable]], outcomes: list[float], *, gamma: float = 0.95, step_weight: float = 1.0, divide_by_std: bool = True
) -> list[list[float]]:
    """GiGPO for the trajectories of one question: states[i] are the states in which the T_i turns of trajectory i were taken.

    With z the z-score (`grpo_advantages`) of outcomes over the group, and z_s that of all returns R from visits of state s:

        A_(i,t) = z(o_i) + step_weight * z_s(R_(i,t)),    R_(i,t) = gamma^(T_i - t) * o_i,    s = states[i][t]

    A state that was visited once has z_s = 0. The published code takes z(o) over turns, so that a long trajectory counts more, and
    deviations with n - 1; by default it divides by none (`divide_by_std=False`).
    """
    episode = grpo_advantages(outcomes, divide_by_std=divide_by_std)
    advantages = [[value] * len(visited) for value, visited in zip(episode, states, strict=True)]
    discounted = [discounted_outcome(len(visited), outcome, gamma) for visited, outcome in zip(states, outcomes, strict=True)]
    visits: dict[Hashable, list[tuple[int, int]]] = {}
    for number, visited in enumerate(states):
        for turn, state in enumerate(visited):
            visits.setdefault(state, []).append((number, turn))
    for places in visits.values():
        returns = [discounted[number][turn] for number, turn in places]
        for (number, turn), step in zip(places, grpo_advantages(returns, divide_by_std=divide_by_std), strict=True):
            advantages[number][turn] += step_weight * step
    return advantages


def gigpo(group: RolloutGroup, config: GiGpo, progress: float) -> None:
    """Set `turn_advantages` by `gigpo_turn_advantages`; the state of a turn is the newest output of the environment."""
    trained = group.trained
    advantages = gigpo_turn_advantages(
        [list(_states(group, trajectory)) for trajectory in trained],
        [trajectory.reward for trajectory in trained],
        gamma=config.gamma,
        step_weight=config.step_weight,
        divide_by_std=config.divide_by_std,
    )
    for trajectory, turns in zip(trained, advantages, strict=True):
        trajectory.turn_advantages = turns


def _states(group: RolloutGroup, trajectory: Trajectory) -> Iterator[tuple[int, ...]]:
    """Tokens of the newest tool result (of the prompt, for the first turn) before every turn. [num_turns]

    Searches that found the same passages lead to the same state, whatever the query was; earlier history is
    ignored, as in the paper's code, because otherwise hardly any states would be equal.
    """
    shown: tuple[int, ...] = ()
    for node in (group.nodes[number] for number in trajectory.path):
        if node.kind in ("prompt", "observation"):
            shown = tuple(node.token_ids)
        elif node.kind == "action":
            yield shown
