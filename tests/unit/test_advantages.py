"""Advantages: published golden cases, and numbers worked by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from igpo_megatron.algorithms.advantages.anchor import GiGpo, gigpo_turn_advantages
from igpo_megatron.algorithms.advantages.outcome import (
    GREEDY_REWARD,
    Grpo,
    Rapo,
    ReinforcePp,
    ReinforcePpBaseline,
    ReMax,
    Rloo,
    grpo_advantages,
    rloo_advantages,
    token_weighted_advantages,
)
from igpo_megatron.algorithms.advantages.registry import ADVANTAGES, set_advantages
from igpo_megatron.algorithms.advantages.turn import (
    Eapo,
    Igpo,
    IgpoLoo,
    eapo_turn_advantages,
    igpo_loo_turn_advantages,
    igpo_turn_advantages,
)
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "igpo_advantages.json"


def group_with(gains, rewards, statuses=None):
    """A group whose trajectory i has `len(gains[i])` turns; the last gain is the answer turn's."""
    group = RolloutGroup(Prompt("q", "Where?", ("Rome",), "test"), [Node(None, "prompt", [1])])
    for number, (turns, reward) in enumerate(zip(gains, rewards, strict=True)):
        path = [0]
        for turn in range(1, len(turns) + 1):
            path.append(group.add(Node(path[-1], "action", [2], turn=turn)))
        status = statuses[number] if statuses else Status.FINISHED
        group.trajectories.append(Trajectory(path=path, status=status, reward=reward, gains=list(turns)))
    return group


def advantages_of(group, config, progress=0.0):
    set_advantages([group], config, progress)
    return [trajectory.turn_advantages for trajectory in group.trajectories]


def flat(nested):
    return [value for turns in nested for value in turns]


def test_igpo_matches_every_golden_case():
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) == 76
    for case in cases:
        expected = case.pop("turn_advantages")
        got = igpo_turn_advantages(**case)
        assert [len(turns) for turns in got] == [len(turns) for turns in expected]
        assert flat(got) == pytest.approx(flat(expected), rel=1e-4, abs=1e-5)


def test_golden_cases_can_fail():
    case = next(case for case in json.loads(GOLDEN.read_text()) if case["gamma"] == 0.5 and len(case["outcomes"]) > 1)
    expected = flat(case.pop("turn_advantages"))
    case["gamma"] = 0.9
    assert flat(igpo_turn_advantages(**case)) != pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_igpo_gives_a_turn_its_own_gain_and_the_discounted_rest():
    """Gains 1, 3 | 2: mean 2, so centred -1, 1 | 0. Outcomes 1 | 0: centred 0.5 | -0.5. gamma 0.5, from the back:
    0.5; 1 + 0.25 = 1.25; -1 + 0.625 = -0.375  |  -0.5; 0 - 0.25."""
    got = igpo_turn_advantages([[1.0, 3.0], [2.0]], [1.0, 0.0], gamma=0.5, divide_by_std=False)
    assert flat(got) == pytest.approx([-0.375, 1.25, 0.5, -0.25, -0.5])


def test_igpo_joint_normalises_gains_and_outcomes_in_one_population():
    """Gain 3 and outcomes 1, -1: mean 1, centred 2, 0, -2; sum from the back: 2 + 0, 0 | -2."""
    got = igpo_turn_advantages([[3.0], []], [1.0, -1.0], normalise="joint", divide_by_std=False)
    assert flat(got) == pytest.approx([2.0, 0.0, -2.0])


def test_a_gain_that_was_not_measured_counts_neither_as_zero_nor_as_a_term():
    """Gains 4, None, 2: mean 3 (a zero would make it 2). The None turn passes on what follows it, discounted."""
    got = igpo_turn_advantages([[4.0, None], [2.0]], [0.0, 0.0], gamma=0.5, divide_by_std=False)
    assert flat(got) == pytest.approx([1.0, 0.0, 0.0, -1.0, 0.0])
    with_zero = igpo_turn_advantages([[4.0, 0.0], [2.0]], [0.0, 0.0], gamma=0.5, divide_by_std=False)
    assert flat(with_zero) == pytest.approx([1.0, -2.0, 0.0, 0.0, 0.0])


def test_a_single_value_and_an_empty_population_normalise_to_zero():
    assert igpo_turn_advantages([[0.7]], [0.9]) == [[0.0, 0.0]]
    assert igpo_turn_advantages([[None]], [0.9]) == [[0.0, 0.0]]
    assert igpo_turn_advantages([], []) == []


def test_igpo_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="normalise='per_turn' is unknown; use 'separate' or 'joint'"):
        igpo_turn_advantages([[0.1]], [1.0], normalise="per_turn")
    with pytest.raises(ValueError, match="gains of 1 trajectories but outcomes of 2"):
        igpo_turn_advantages([[0.1]], [1.0, 2.0])
    with pytest.raises(ValueError, match="gains contain nan"):
        igpo_loo_turn_advantages([[math.nan], []], [1.0, 2.0])
    with pytest.raises(ValueError, match="outcomes contain inf"):
        igpo_turn_advantages([[]], [math.inf])


def test_weights_act_after_normalisation():
    """Before the z-score a weight cancels; after it, doubling the gain weight adds the gain part once more."""
    gains, outcomes = [[0.3, -0.1], [0.5], [-0.4]], [1.0, 0.2, -2.0]
    plain = flat(igpo_turn_advantages(gains, outcomes))
    only_outcome = flat(igpo_turn_advantages(gains, outcomes, gain_weight=0.0))
    doubled = flat(igpo_turn_advantages(gains, outcomes, gain_weight=2.0))
    assert doubled == pytest.approx([2 * a - b for a, b in zip(plain, only_outcome, strict=True)])
    assert doubled != pytest.approx(plain, abs=0.1)

    before_the_zscore = flat(igpo_turn_advantages([[2 * gain for gain in turns] for turns in gains], outcomes))
    assert before_the_zscore == pytest.approx(plain, abs=1e-4)


def test_the_curriculum_moves_from_the_first_weight_to_the_last():
    gains, rewards = [[0.4, None], [0.1, None]], [1.0, 0.0]
    config = Igpo(gain_weight=(1.0, 0.0), outcome_weight=(0.5, 1.0))
    start, middle, end = (flat(advantages_of(group_with(gains, rewards), config, progress)) for progress in (0.0, 0.5, 1.0))
    # Two values z-score to +1 and -1: gain weight + outcome weight, then the outcome weight alone.
    assert start == pytest.approx([1.5, 0.5, -1.5, -0.5], abs=1e-4)
    assert middle == pytest.approx([1.25, 0.75, -1.25, -0.75], abs=1e-4)
    assert end == pytest.approx([1.0, 1.0, -1.0, -1.0], abs=1e-4)


def test_igpo_loo_compares_each_turn_with_the_others_at_the_same_turn():
    """Gains 1, 3 | 2 | none: s_g = sqrt(2/3). Outcomes 2, 0, 1 : s_o = sqrt(2/3) too. Call it s; in units of 1/s, gamma 0.5:
    G_1 = 1 + 0.5 * (3 + 0.5 * 2) = 3, 4, 2;   G_2 = 2 + 0, 0;   G_3 = 1.
    Turn 1: G = 3, 2, 1 -> 3 - 1.5, 2 - 2, 1 - 2.5.   Turn 2: G = 4, 0, 0 (over) -> 4, -2.   Turn 3: 2, 0, 0 -> 2."""
    s = math.sqrt(2 / 3)
    got = igpo_loo_turn_advantages([[1.0, 3.0], [2.0], []], [2.0, 0.0, 1.0], gamma=0.5)
    assert [len(turns) for turns in got] == [3, 2, 1]
    assert flat(got) == pytest.approx([value / s for value in (1.5, 4.0, 2.0, 0.0, -2.0, -1.5)])


def test_igpo_loo_weighs_and_skips_like_its_formula():
    """Outcomes 1 and 1 are degenerate: s_o = 1. Gains 4, 2 (one missing): s_g = 1. With weights 3 and 0.5:
    first: G = 12 + 0 + 0.5, 0.5, 0.5; second: 6 + 0.5, 0.5; the others' mean is the other trajectory's G, 0 once it is over."""
    got = igpo_loo_turn_advantages([[4.0, None], [2.0]], [1.0, 1.0], gain_weight=3.0, outcome_weight=0.5)
    assert flat(got) == pytest.approx([6.0, 0.0, 0.5, -6.0, 0.0])


def test_igpo_loo_of_one_trajectory_is_zero():
    assert igpo_loo_turn_advantages([[0.3, None]], [1.0]) == [[0.0, 0.0, 0.0]]
    assert igpo_loo_turn_advantages([], []) == []


def test_igpo_loo_does_not_blow_up_rounding_noise():
    got = flat(igpo_loo_turn_advantages([[], [], []], [0.1 + 0.2, 0.3, 0.3]))
    assert got == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


def test_grpo_divides_by_the_population_standard_deviation():
    """Rewards 1, 0, 0, 1: mean 0.5, population std 0.5 (with n - 1 it would be 0.577)."""
    assert grpo_advantages([1.0, 0.0, 0.0, 1.0]) == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-5)
    assert grpo_advantages([1.0, 0.0, 0.0, 1.0], divide_by_std=False) == [0.5, -0.5, -0.5, 0.5]
    assert grpo_advantages([0.7]) == [0.0]
    assert grpo_advantages([0.1] * 3) == pytest.approx([0.0] * 3, abs=1e-9)


def test_grpo_is_igpo_without_gains():
    rewards = [1.0, -2.0, 0.4]
    assert [[advantage] * 2 for advantage in grpo_advantages(rewards)] == igpo_turn_advantages([[None]] * 3, rewards)


def test_rloo_subtracts_the_mean_of_the_others():
    """1 - (0 + 0.5) / 2, 0 - (1 + 0.5) / 2, 0.5 - (1 + 0) / 2."""
    assert rloo_advantages([1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    assert rloo_advantages([0.7]) == [0.0]


@pytest.mark.parametrize(
    "config",
    [Igpo(), IgpoLoo(), Grpo(), Rloo(), GiGpo(), Eapo(), Rapo(), ReinforcePp(), ReinforcePpBaseline()],
    ids=lambda config: config.name,
)
def test_failed_trajectories_change_nobody_and_get_zeros(config):
    gains, rewards = [[0.2, 0.1, None], [0.0, None]], [1.0, 0.0]
    alone = advantages_of(group_with(gains, rewards), config)
    statuses = [Status.FINISHED, Status.BAD_FORMAT, Status.TOOL_FAILED, Status.ENGINE_FAILED]
    beside_failures = advantages_of(group_with([*gains, [9.0, None], []], [*rewards, 50.0, 50.0], statuses), config)
    assert beside_failures == [*alone, [0.0, 0.0], []]
    assert [len(turns) for turns in alone] == [3, 2]
    assert any(flat(alone))


def test_a_trajectory_without_turns_is_left_out():
    assert advantages_of(group_with([[], [None]], [-2.0, 1.0]), Grpo()) == [[], [0.0]]


def test_outcome_advantages_are_the_same_for_every_turn():
    assert advantages_of(group_with([[None] * 3, [None]], [1.0, 0.0]), Rloo()) == [[1.0, 1.0, 1.0], [-1.0]]


def test_the_last_gain_is_replaced_by_the_outcome():
    """Only gains[:-1] enter: a number in the last place must change nothing."""
    config = Igpo(divide_by_std=False, gamma=0.5)
    got = advantages_of(group_with([[1.0, 3.0, 99.0], [2.0, None]], [1.0, 0.0]), config)
    assert flat(got) == pytest.approx([-0.375, 1.25, 0.5, -0.25, -0.5])


def test_gains_must_be_there_before_turn_advantages():
    group = group_with([[None, None]], [1.0])
    group.trajectories[0].gains = []
    with pytest.raises(AssertionError, match="call turn_gains first"):
        advantages_of(group, Igpo())


def test_every_advantage_is_in_the_table_of_the_documents_and_under_the_name_of_its_section():
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text(encoding="utf-8")
    table = page.partition("## All algorithms")[2].partition("\nLeft out")[0]
    assert [name for name in ADVANTAGES if f"| `{name}`" not in table and f"| `advantage.name={name}`" not in table] == []
    assert [*ADVANTAGES] == [entry.section().name for entry in ADVANTAGES.values()]
    assert {name for name, entry in ADVANTAGES.items() if entry.section.needs_probes} == {"igpo", "igpo_loo"}


def test_advantages_are_importable_without_torch():
    code = "import sys; from igpo_megatron.algorithms.advantages.turn import igpo_turn_advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gigpo_compares_returns_within_a_state_and_outcomes_within_the_group():
    """Outcomes 1, 0 (centred 0.5, -0.5), gamma 0.5, means only. State `q`: returns 0.5 and 0 (centred 0.25, -0.25), `p`: 1 alone."""
    got = gigpo_turn_advantages([["q", "p"], ["q"]], [1.0, 0.0], gamma=0.5, divide_by_std=False)
    assert flat(got) == pytest.approx([0.75, 0.5, -0.75])
    doubled = gigpo_turn_advantages([["q", "p"], ["q"]], [1.0, 0.0], gamma=0.5, step_weight=2.0, divide_by_std=False)
    assert flat(doubled) == pytest.approx([1.0, 0.5, -1.0])


def test_gigpo_counts_a_state_visited_twice_by_one_trajectory_twice():
    """State `p`: returns 0.5, 1 of the first and 0 of the second, mean 0.5; outcomes centred 0.5, -0.5."""
    got = gigpo_turn_advantages([["p", "p"], ["p"]], [1.0, 0.0], gamma=0.5, divide_by_std=False)
    assert flat(got) == pytest.approx([0.5, 1.0, -1.0])


def test_the_state_of_a_turn_is_the_newest_tool_result():
    """Both searches found passage 7, so the second turns meet in one state; outcomes are equal up to there."""
    group = RolloutGroup(Prompt("q", "Where?", ("Rome",), "test"), [Node(None, "prompt", [1])])
    for query, reward in ((3, 1.0), (4, 0.0)):
        search = group.add(Node(0, "action", [query], turn=1))
        found = group.add(Node(search, "observation", [7], turn=1))
        answer = group.add(Node(found, "action", [5], turn=2))
        group.trajectories.append(Trajectory([0, search, found, answer], Status.FINISHED, reward=reward))
    got = advantages_of(group, GiGpo(gamma=1.0, divide_by_std=False))
    assert got == [[1.0, 1.0], [-1.0, -1.0]]
    group.nodes[2].token_ids = [8]
    assert advantages_of(group, GiGpo(gamma=1.0, divide_by_std=False)) == [[1.0, 0.5], [-1.0, -0.5]]


def test_reinforce_pp_whitens_over_all_tokens_of_the_batch():
    """Rewards 1 and 0 in one group, 0 in another; tokens 1, 1 | 2: mean 1/4, std sqrt(3)/4. With the group's baseline first: 0.5, -0.5 | 0:
    mean 0, var 1/8."""
    groups = [group_with([[None], [None]], [1.0, 0.0]), group_with([[None, None]], [0.0])]
    assert over_batch(groups, ReinforcePp()) == pytest.approx(
        [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)], rel=1e-5
    )
    assert over_batch(groups, ReinforcePpBaseline()) == pytest.approx([math.sqrt(2), -math.sqrt(2), 0.0, 0.0], rel=1e-5)


def over_batch(groups, config):
    set_advantages(groups, config, 0.0)
    return [value for group in groups for trajectory in group.trajectories for value in trajectory.turn_advantages]


def test_whitening_leaves_equal_rewards_and_empty_batches_alone():
    assert over_batch([group_with([[None], [None]], [1.0, 1.0])], ReinforcePp()) == [0.0, 0.0]
    assert over_batch([group_with([[None]], [1.0], [Status.TOOL_FAILED])], ReinforcePp()) == [0.0]


def test_remax_subtracts_the_greedy_reward():
    group = group_with([[None, None], [None]], [1.0, 0.25])
    with pytest.raises(ValueError, match="has no greedy trajectory's reward"):
        advantages_of(group, ReMax())
    group.metrics[GREEDY_REWARD] = 0.5
    assert advantages_of(group, ReMax()) == [[0.5, 0.5], [-0.25]]
    group.metrics[GREEDY_REWARD] = math.nan
    assert advantages_of(group, ReMax()) == [[0.0, 0.0], [0.0]]


def test_eapo_discounts_the_outcome_per_remaining_turn_and_compares_all_turns_of_the_group():
    """gamma 1/2: rewards 1/4, 1/2, 1 | 1/2, 1 | 0: mean 13/24. The squares sum to 41/16, so the variance is 41/96 - 169/576."""
    mean, std = 13 / 24, math.sqrt(41 / 96 - 169 / 576)
    got = eapo_turn_advantages([3, 2, 1], [1.0, 1.0, 0.0], gamma=0.5)
    assert [len(turns) for turns in got] == [3, 2, 1]
    assert flat(got) == pytest.approx([(reward - mean) / std for reward in (0.25, 0.5, 1.0, 0.5, 1.0, 0.0)], rel=1e-5)
    group = group_with([[None] * 3, [None] * 2, [None]], [1.0, 1.0, 0.0])
    assert advantages_of(group, Eapo(gamma=0.5)) == got
    assert eapo_turn_advantages([2], [1.0], gamma=1.0) == [[0.0, 0.0]] and eapo_turn_advantages([], []) == []


def test_rapo_makes_up_for_groups_that_teach_nothing():
    """One of three groups has rewards that differ: its advantages, +-1, count threefold. A group of which nothing is trained is none."""
    groups = [
        group_with([[None], [None]], [1.0, 0.0]),
        group_with([[None], [None]], [1.0, 1.0]),
        group_with([[None]], [0.0]),
        group_with([[None], [None]], [1.0, 0.0], [Status.TOOL_FAILED] * 2),
    ]
    assert over_batch(groups, Rapo()) == pytest.approx([3.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0], rel=1e-5)
    assert over_batch(groups[1:], Rapo()) == [0.0] * 5


def test_the_token_level_group_average_counts_a_trajectory_by_its_length():
    """Rewards 1 of 3 tokens and 0 of 1: mean 3/4, std sqrt(3)/4. 1 of 1 token beside 0 of 49 would get 7: GRPO's instead."""
    assert token_weighted_advantages([1.0, 0.0], [3, 1], divide_by_std=False) == [0.25, -0.75]
    assert token_weighted_advantages([1.0, 0.0], [3, 1]) == pytest.approx([1 / math.sqrt(3), -math.sqrt(3)], rel=1e-5)
    assert token_weighted_advantages([1.0, 0.0], [1, 49]) == pytest.approx([1.0, -1.0], abs=1e-5)
    assert advantages_of(group_with([[None] * 3, [None]], [1.0, 0.0]), Grpo(statistics="tokens", divide_by_std=False)) == [
        [0.25] * 3,
        [-0.75],
    ]
