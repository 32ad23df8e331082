"""Probe leaves and the gains read from them."""

import math

import pytest

from igpo_megatron.algorithms.info_gain import add_probes, turn_gains
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.types import Node, ProbeScore, Prompt, RolloutGroup, Status, Trajectory


def group_with(turns, *, statuses=None, force_think=False, answers=("Rome",)):
    """One group whose trajectories share the prompt (and the first forced node) and have `turns[i]` actions."""
    group = RolloutGroup(Prompt("q", "Where?", answers, "test"), [Node(None, "prompt", [1, 2])])
    root = group.add(Node(0, "forced", [3], turn=1)) if force_think else 0
    for number, count in enumerate(turns):
        path = [0, root] if force_think else [0]
        for turn in range(1, count + 1):
            if turn > 1:
                path.append(group.add(Node(path[-1], "observation", [4], turn=turn - 1)))
                if force_think:
                    path.append(group.add(Node(path[-1], "forced", [3], turn=turn)))
            path.append(group.add(Node(path[-1], "action", [5, 6], turn=turn)))
        group.trajectories.append(Trajectory(path=path, status=statuses[number] if statuses else Status.FINISHED))
    return group


def render(answer):
    """Two tokens of wording, one token per word of the answer, one closing token."""
    words = len(answer.split())
    return [7, 7, *[8] * words, 9], (2, 2 + words)


def probes(group):
    return [node for node in group.nodes if node.kind == "probe"]


def fill(group, value_at):
    """Give every probe log-probs with mean `value_at(probe)`."""
    for probe in probes(group):
        start, stop = probe.scored
        probe.old_logprobs = [value_at(probe)] * (stop - start)


def test_a_probe_hangs_where_each_action_begins_and_samples_share_the_first():
    group = group_with([3, 2])
    add_probes(group, render, Reward())
    # Prompt once for both; one observation of the second sample and two of the first.
    assert [(group.nodes[probe.parent].kind, probe.turn) for probe in probes(group)] == [
        ("prompt", 0),
        ("observation", 1),
        ("observation", 2),
        ("observation", 1),
    ]
    action_parents = {node.parent for node in group.nodes if node.kind == "action"}
    assert {probe.parent for probe in probes(group)} == action_parents
    assert all(probe.scored == (2, 3) and probe.token_ids == [7, 7, 8] for probe in probes(group))


def test_with_forced_think_probes_continue_the_forced_text():
    group = group_with([2, 1], force_think=True)
    add_probes(group, render, Reward())
    assert [(group.nodes[probe.parent].kind, probe.turn) for probe in probes(group)] == [("forced", 0), ("forced", 1)]


def test_only_trainable_trajectories_are_probed():
    group = group_with([1, 3], statuses=[Status.FINISHED, Status.TOOL_FAILED])
    add_probes(group, render, Reward())
    assert [probe.parent for probe in probes(group)] == [0]
    fill(group, lambda probe: -1.0)
    turn_gains(group, Reward())
    assert [trajectory.gains for trajectory in group.trajectories] == [[None], [None, None, None]]


def test_a_gain_is_the_rise_of_the_mean_log_prob_and_the_last_turn_has_none():
    """v = -3, -2, -2.5: gains +1 and -0.5. Tokens outside the scored range hold -50 and must not count."""
    group = group_with([3])
    add_probes(group, render, Reward())
    fill(group, lambda probe: [-3.0, -2.0, -2.5][probe.turn])
    turn_gains(group, Reward())
    assert group.trajectories[0].gains == [1.0, -0.5, None]
    assert group.metrics == {"nonfinite_gains": 0.0, "mixed_version_gains": 0.0}


def test_prob_diff_is_the_rise_of_the_geometric_mean_probability():
    """Two tokens with p = 0.1 and 0.4 have the geometric mean 0.2; p = 0.5 and 0.5 have 0.5: the gain is 0.3, not 0.25."""
    group = group_with([2], answers=("Addis Ababa",))
    config = Reward(gain="prob_diff")
    add_probes(group, render, config)
    before, after = probes(group)
    before.old_logprobs = [math.log(0.1), math.log(0.4)]
    after.old_logprobs = [math.log(0.5), math.log(0.5)]
    turn_gains(group, config)
    assert group.trajectories[0].gains == [pytest.approx(0.3), None]
    turn_gains(group, Reward(gain="log_prob_diff"))
    assert group.trajectories[0].gains == [pytest.approx(math.log(0.5 / 0.2)), None]


def test_none_means_no_probes_and_no_gains():
    group = group_with([3, 1])
    config = Reward(gain="none")
    add_probes(group, render, config)
    turn_gains(group, config)
    assert probes(group) == []
    assert [trajectory.gains for trajectory in group.trajectories] == [[None, None, None], [None]]


def test_the_alias_policy_chooses_what_is_probed():
    answers = ("Federal Republic of Germany", "Germany", "Deutschland", "Germany")

    def probed(policy):
        group = group_with([1], answers=answers)
        add_probes(group, render, Reward(probe_alias=policy))
        return [probe.text for probe in probes(group)]

    assert probed("first") == ["Federal Republic of Germany"]
    assert probed("shortest") == ["Germany"]
    assert probed("max") == ["Federal Republic of Germany", "Germany", "Deutschland"]


def test_max_takes_the_best_alias_of_each_context():
    """Turn 0: max(-4, -3) = -3. Turn 1: max(-1, -2) = -1. Gain 2, though no single alias gained 2."""
    group = group_with([2], answers=("Rome", "Roma"))
    config = Reward(probe_alias="max")
    add_probes(group, render, config)
    fill(group, lambda probe: {("Rome", 0): -4.0, ("Roma", 0): -3.0, ("Rome", 1): -1.0, ("Roma", 1): -2.0}[probe.text, probe.turn])
    turn_gains(group, config)
    assert group.trajectories[0].gains == [2.0, None]


@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_a_value_that_is_not_finite_costs_only_the_gains_beside_it(broken):
    group = group_with([5])
    add_probes(group, render, Reward())
    fill(group, lambda probe: [-4.0, broken, -3.0, -2.0, -2.0][probe.turn])
    turn_gains(group, Reward())
    # A measured zero stays zero; only the two gains that touch v_1 are absent.
    assert group.trajectories[0].gains == [None, None, 1.0, 0.0, None]
    assert group.metrics["nonfinite_gains"] == 2.0


@pytest.mark.parametrize("order", [("Rome", "Roma"), ("Roma", "Rome")])
def test_max_does_not_hide_an_alias_that_is_not_finite(order):
    group = group_with([2], answers=order)
    config = Reward(probe_alias="max")
    add_probes(group, render, config)
    fill(group, lambda probe: math.nan if (probe.text, probe.turn) == ("Rome", 1) else -1.0)
    turn_gains(group, config)
    assert group.trajectories[0].gains == [None, None]


def test_adding_probes_again_replaces_them():
    group = group_with([2], answers=("Rome", "Roma"))
    add_probes(group, render, Reward(probe_alias="max"))
    add_probes(group, render, Reward(probe_alias="first"))
    assert [(probe.text, probe.turn) for probe in probes(group)] == [("Rome", 0), ("Rome", 1)]
    add_probes(group, render, Reward(gain="none"))
    assert probes(group) == []


def test_gains_need_scored_probes():
    group = group_with([2])
    with pytest.raises(AssertionError, match="add_probes first"):
        turn_gains(group, Reward())
    add_probes(group, render, Reward())
    with pytest.raises(AssertionError, match="score probes first"):
        turn_gains(group, Reward())


def test_what_an_engine_scored_is_filled_in_with_its_weight_version():
    group = group_with([2])
    group.probe_scores = {(0, "Rome"): ProbeScore((-3.0,), 4), (2, "Rome"): ProbeScore((-1.0,), 4)}
    add_probes(group, render, Reward(scorer="engine"))
    assert [(probe.old_logprobs[0], probe.weight_version) for probe in probes(group)] == [(-3.0, 4), (-1.0, 4)]
    turn_gains(group, Reward(scorer="engine"))
    assert group.trajectories[0].gains == [2.0, None]


def test_a_difference_between_two_weights_is_no_gain_and_is_counted():
    group = group_with([3])
    add_probes(group, render, Reward())
    fill(group, lambda probe: -3.0 + probe.turn)
    for probe, version in zip(probes(group), (4, 5, 5), strict=True):
        probe.weight_version = version
    turn_gains(group, Reward())
    assert group.trajectories[0].gains == [None, 1.0, None]
    assert group.metrics["mixed_version_gains"] == 1.0


def hidden(answer, last_token):
    """An empty tool message of three tokens before the probe."""
    token_ids, (start, stop) = render(answer)
    return [4, 4, 4, *token_ids], (start + 3, stop + 3)


def test_evidence_is_what_the_newest_result_adds_to_the_value():
    """v = -3, -1, -0.5 and with the newest result hidden -2.5 and -1.25: the results brought 1.5 and 0.75 of the gains 2 and 0.5."""
    group = group_with([3, 1])
    config = Reward(evidence=True)
    add_probes(group, render, config, hidden)
    at_actions = [probe for probe in probes(group) if group.nodes[probe.parent].kind == "action"]
    assert [(probe.turn, probe.token_ids[:3], probe.scored) for probe in at_actions] == [(1, [4, 4, 4], (5, 6)), (2, [4, 4, 4], (5, 6))]
    values = {"seen": [-3.0, -1.0, -0.5], "hidden": [None, -2.5, -1.25]}
    fill(group, lambda probe: values["hidden" if probe in at_actions else "seen"][probe.turn])
    turn_gains(group, config)
    first, second = group.trajectories
    assert first.gains == [2.0, 0.5, None] and first.evidence_gains == [1.5, 0.75, None]
    assert second.gains == [None] and second.evidence_gains == [None]


def test_evidence_is_off_by_default():
    group = group_with([2])
    add_probes(group, render, Reward(), hidden)
    assert {group.nodes[probe.parent].kind for probe in probes(group)} == {"prompt", "observation"}
    fill(group, lambda probe: -1.0)
    turn_gains(group, Reward())
    assert group.trajectories[0].evidence_gains == []
