"""Probes and the gains made of them, on a two-turn trajectory."""

from __future__ import annotations

import math

import pytest

from igpo_megatron.algorithms.info_gain import NONFINITE_GAINS, add_probes, turn_gains
from igpo_megatron.config.schema import Reward
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory


def two_turns(*answers: str) -> RolloutGroup:
    """prompt - action 1 - observation - action 2, and a sibling that answers at once."""
    group = RolloutGroup(Prompt("q", "?", answers or ("ab",), "test"), [Node(None, "prompt", [1, 2])])
    group.add(Node(0, "action", [3], 1))
    group.add(Node(1, "observation", [4, 5], 1))
    group.add(Node(2, "action", [6], 2))
    group.add(Node(0, "action", [7], 1))
    group.trajectories = [Trajectory([0, 1, 2, 3], Status.FINISHED), Trajectory([0, 4], Status.FINISHED)]
    return group


def render(answer: str) -> tuple[list[int], tuple[int, int]]:
    """Two template tokens, one per character, one template token."""
    return [90, 91, *map(ord, answer), 92], (2, 2 + len(answer))


def probes(group: RolloutGroup) -> list[Node]:
    return [node for node in group.nodes if node.kind == "probe"]


def test_a_probe_hangs_before_every_turn_and_siblings_share_the_first() -> None:
    group = two_turns()
    add_probes(group, render, Reward())
    assert [(probe.parent, probe.turn, probe.scored) for probe in probes(group)] == [(0, 0, (2, 4)), (2, 1, (2, 4))]


def test_the_gain_of_a_turn_is_the_rise_of_the_mean_log_prob_of_the_answer_alone() -> None:
    """v_0 = mean(-4, -2) = -3, v_1 = mean(-1, -1) = -1; template tokens (-100) do not count."""
    group = two_turns()
    add_probes(group, render, Reward())
    first, second = probes(group)
    first.old_logprobs = [-100.0, -100.0, -4.0, -2.0, -100.0]
    second.old_logprobs = [-100.0, -100.0, -1.0, -1.0, -100.0]
    turn_gains(group, Reward())
    assert [trajectory.gains for trajectory in group.trajectories] == [[2.0, None], [None]]
    turn_gains(group, Reward(gain="prob_diff"))
    assert group.trajectories[0].gains == [pytest.approx(math.exp(-1) - math.exp(-3)), None]


def test_none_means_no_probes_and_no_gains() -> None:
    group = two_turns()
    add_probes(group, render, Reward(gain="none"))
    turn_gains(group, Reward(gain="none"))
    assert probes(group) == [] and group.trajectories[0].gains == [None, None]


@pytest.mark.parametrize(("policy", "texts"), [("first", ["abc"]), ("shortest", ["z"]), ("max", ["abc", "z"])])
def test_the_alias_policy_chooses_what_is_probed(policy: str, texts: list[str]) -> None:
    group = two_turns("abc", "z", "abc")
    add_probes(group, render, Reward(probe_alias=policy))  # type: ignore[arg-type]
    assert [probe.text for probe in probes(group) if probe.parent == 0] == texts
    assert group.prompt.answers == ("abc", "z", "abc")


def test_max_takes_the_best_alias_of_each_state() -> None:
    group = two_turns("a", "b")
    add_probes(group, render, Reward(probe_alias="max"))
    for probe, value in zip(probes(group), (-5.0, -3.0, -1.0, -2.0), strict=True):
        probe.old_logprobs = [0.0, 0.0, value, 0.0]
    turn_gains(group, Reward(probe_alias="max"))
    assert group.trajectories[0].gains == [2.0, None]


def test_a_value_that_is_not_finite_costs_its_gains_and_is_counted() -> None:
    group = two_turns()
    add_probes(group, render, Reward())
    first, second = probes(group)
    first.old_logprobs, second.old_logprobs = [0.0, 0.0, -math.inf, 0.0, 0.0], [0.0] * 5
    turn_gains(group, Reward())
    assert group.trajectories[0].gains == [None, None] and group.metrics[NONFINITE_GAINS] == 1.0


def test_failed_trajectories_are_not_probed() -> None:
    group = two_turns()
    group.trajectories[0].status = Status.TOOL_FAILED
    add_probes(group, render, Reward())
    assert [probe.parent for probe in probes(group)] == [0]
