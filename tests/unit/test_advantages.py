"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from igpo_megatron.algorithms import ADVANTAGES, grpo_advantages, igpo_loo_turn_advantages, igpo_turn_advantages, rloo_advantages
from igpo_megatron.config.schema import Grpo, Igpo, IgpoLoo, Rloo
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

CONFIGS = {"igpo": Igpo(), "igpo_loo": IgpoLoo(), "grpo": Grpo(), "rloo": Rloo()}


def group_with(gains: list[list[float | None]], rewards: list[float]) -> RolloutGroup:
    """One trajectory per row; `gains` ends with the None of the answer turn."""
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1])])
    for row, reward in zip(gains, rewards, strict=True):
        path = [0]
        for turn in range(len(row)):
            path.append(group.add(Node(path[-1], "action", [2], turn + 1)))
        group.trajectories.append(Trajectory(path, Status.FINISHED, reward=reward, gains=row))
    return group


def test_igpo_gives_a_turn_its_own_gain_and_the_discounted_rest() -> None:
    """gains 1 and 3: mean 2, std 1 -> -1 and +1; outcomes 0 and 1 -> -1 and +1; A_1 = z(g) + 0.5 z(o)."""
    found = igpo_turn_advantages([[1.0], [3.0]], [0.0, 1.0], gamma=0.5)
    assert found == [pytest.approx([-1.5, -1.0], abs=1e-4), pytest.approx([1.5, 1.0], abs=1e-4)]


def test_igpo_jointly_normalised_uses_one_population() -> None:
    """gains and outcomes 1, 3, 1, 3: mean 2, std 1."""
    found = igpo_turn_advantages([[1.0], [3.0]], [1.0, 3.0], normalise="joint")
    assert found == [pytest.approx([-2.0, -1.0], abs=1e-4), pytest.approx([2.0, 1.0], abs=1e-4)]


def test_an_unmeasured_gain_is_left_out_of_the_statistics_and_a_zero_gain_is_not() -> None:
    """Measured 1, 3: mean 2. With 0 measured too: mean 4/3."""
    without = igpo_turn_advantages([[1.0, None], [3.0]], [0.0, 0.0], divide_by_std=False)
    assert without == [pytest.approx([-1.0, 0.0, 0.0]), pytest.approx([1.0, 0.0])]
    with_zero = igpo_turn_advantages([[1.0, 0.0], [3.0]], [0.0, 0.0], divide_by_std=False)
    assert with_zero[1] == pytest.approx([3 - 4 / 3, 0.0])


def test_weights_act_after_normalisation_where_before_it_they_would_cancel() -> None:
    plain = igpo_turn_advantages([[1.0], [3.0]], [0.0, 1.0])
    weighted = igpo_turn_advantages([[1.0], [3.0]], [0.0, 1.0], gain_weight=0.5)
    scaled_before = igpo_turn_advantages([[0.5], [1.5]], [0.0, 1.0])
    assert weighted[0][0] == pytest.approx(plain[0][0] + 0.5, abs=1e-4)
    assert scaled_before[0][0] == pytest.approx(plain[0][0], abs=1e-4)


def test_igpo_loo_compares_each_turn_with_the_others_returns_from_that_turn() -> None:
    """Scales: gains 0, 2, 4 have std sqrt(8/3); outcomes 0, 1 have std 1/2.

    G_0 = [0/s + 2/s + 0, 2/s + 0, 0], G_1 = [4/s + 2, 2]; the second trajectory is over at its third turn, where it counts 0.
    """
    s = math.sqrt(8 / 3)
    found = igpo_loo_turn_advantages([[0.0, 2.0], [4.0]], [0.0, 1.0])
    assert found[0] == pytest.approx([2 / s - (4 / s + 2), 2 / s - 2, 0.0])
    assert found[1] == pytest.approx([4 / s + 2 - 2 / s, 2 - 2 / s])


def test_igpo_loo_of_one_trajectory_or_of_equal_ones_is_zero() -> None:
    assert igpo_loo_turn_advantages([[0.3, 0.1]], [1.0]) == [[0.0, 0.0, 0.0]]
    assert igpo_loo_turn_advantages([[0.3], [0.3]], [1.0, 1.0]) == [pytest.approx([0.0, 0.0])] * 2


def test_igpo_subtracts_the_mean_gain_once_per_remaining_turn_and_igpo_loo_does_not() -> None:
    """Every search gains 1. The published order values a rollout with more searches no higher; leave-one-out does."""
    gains: list[list[float | None]] = [[1.0, 1.0], [1.0]]
    assert igpo_turn_advantages(gains, [1.0, 1.0])[0][0] == pytest.approx(0.0)
    assert igpo_loo_turn_advantages(gains, [1.0, 1.0])[0][0] == pytest.approx(1.0)


def test_grpo_and_rloo() -> None:
    """Rewards 0, 0, 3: mean 1, population std sqrt 2; leave-one-out baselines 1.5, 1.5, 0."""
    assert grpo_advantages([0.0, 0.0, 3.0]) == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)], abs=1e-5)
    assert grpo_advantages([0.0, 0.0, 3.0], divide_by_std=False) == pytest.approx([-1.0, -1.0, 2.0])
    assert rloo_advantages([0.0, 0.0, 3.0]) == [-1.5, -1.5, 3.0]
    assert grpo_advantages([1.0]) == [0.0] and rloo_advantages([1.0]) == [0.0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_advantage_leaves_failed_trajectories_out_of_its_statistics(name: str) -> None:
    gains: list[list[float | None]] = [[0.1, None], [0.5, None]]
    alone, with_failed = group_with(gains, [0.0, 1.0]), group_with([*gains, [9.0, None]], [0.0, 1.0, 50.0])
    with_failed.trajectories[2].status = Status.TOOL_FAILED
    for group in (alone, with_failed):
        ADVANTAGES[name].function(group, CONFIGS[name], 0.0)
    found = [trajectory.turn_advantages for trajectory in with_failed.trajectories]
    assert found[:2] == [trajectory.turn_advantages for trajectory in alone.trajectories]
    assert found[2] == [0.0, 0.0] and any(abs(value) > 0.1 for value in found[0])


def test_weight_schedules_follow_the_progress_of_the_run() -> None:
    config = Igpo(gain_weight=(1.0, 0.0))
    first, last = group_with([[1.0, None], [3.0, None]], [0.0, 1.0]), group_with([[1.0, None], [3.0, None]], [0.0, 1.0])
    ADVANTAGES["igpo"].function(first, config, 0.0)
    ADVANTAGES["igpo"].function(last, config, 1.0)
    assert first.trajectories[0].turn_advantages[0] == pytest.approx(-2.0, abs=1e-4)
    assert last.trajectories[0].turn_advantages[0] == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("gains", "outcomes", "options", "message"),
    [
        ([[1.0]], [0.0], {"normalise": "both"}, "normalise='both'"),
        ([[1.0]], [0.0, 1.0], {}, "1"),
        ([[math.nan]], [0.0], {}, "nan"),
    ],
)
def test_bad_input_is_named(gains: list[list[float | None]], outcomes: list[float], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        igpo_turn_advantages(gains, outcomes, **options)  # type: ignore[arg-type]
