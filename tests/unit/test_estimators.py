"""What the advantage estimators estimate: their mean policy gradient on small decision processes whose true gradient is known.

    turn t:  search (probability sigmoid(theta_t), brings a gain)  ──> next turn, or
             answer (earns the outcome) ──> over; the last turn always answers

A softmax policy over two actions makes every score function a number, so "the gradient" is a short vector and its bias can be measured.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import fmean

import pytest

from igpo_megatron.algorithms import ADVANTAGES, gigpo_turn_advantages, igpo_loo_turn_advantages, igpo_turn_advantages, rloo_advantages
from igpo_megatron.config.schema import GiGpo, Grpo, Igpo, IgpoLoo, ReinforcePp, ReinforcePpBaseline, Rloo
from igpo_megatron.packing.tree import pack_for_training
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

THETA = (0.3, -0.2)
"""Logits of searching on in turn 1 and in turn 2; turn 3 answers."""

GROUP = 4
"""Trajectories per group: small, so that a baseline's dependence on the trajectory itself would show."""


@dataclass(frozen=True)
class Walk:
    """One trajectory: its number of searches and the rewards along the way."""

    searches: int
    gains: list[float]
    outcome: float


@dataclass(frozen=True)
class Process:
    """A decision process: what every search gains, and what an answer earns after so many of them."""

    gains: tuple[float, ...]
    outcomes: tuple[float, ...]

    def sample(self, draw: random.Random) -> Walk:
        searches = 0
        while searches < len(THETA) and draw.random() < sigmoid(THETA[searches]):
            searches += 1
        return Walk(searches, list(self.gains[:searches]), self.outcomes[searches])

    def probability(self, searches: int) -> float:
        chances = [sigmoid(theta) for theta in THETA]
        stops = [*(1 - chance for chance in chances), 1.0]
        return math.prod(chances[:searches]) * stops[searches]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def scores(searches: int) -> list[float]:
    """d log-probability of each turn's action / d its own logit; the last turn has no choice. [num_turns]"""
    chosen = [1.0] * searches + [0.0]
    return [action - sigmoid(theta) for action, theta in zip(chosen, THETA, strict=False)]


def true_gradient(process: Process) -> list[float]:
    """d E[sum of gains + outcome] / d THETA, summed over all walks. [turns]"""
    gradient = [0.0] * len(THETA)
    for searches, outcome in enumerate(process.outcomes):
        value = sum(process.gains[:searches]) + outcome
        for turn, score in enumerate(scores(searches)):
            gradient[turn] += process.probability(searches) * value * score
    return gradient


def estimated_gradient(process: Process, estimator, groups: int = 6000, seed: int = 0) -> tuple[list[float], list[float]]:
    """Mean over groups of the estimator's policy gradient, and its standard error. [turns], [turns]"""
    draw = random.Random(seed)
    samples: list[list[float]] = []
    for _ in range(groups):
        walks = [process.sample(draw) for _ in range(GROUP)]
        gradient = [0.0] * len(THETA)
        for walk, advantages in zip(walks, estimator(walks), strict=True):
            for turn, score in enumerate(scores(walk.searches)):
                gradient[turn] += advantages[turn] * score / GROUP
        samples.append(gradient)
    means = [fmean(column) for column in zip(*samples, strict=True)]
    errors = [
        math.sqrt(fmean((value - mean) ** 2 for value in column) / groups)
        for column, mean in zip(zip(*samples, strict=True), means, strict=True)
    ]
    return means, errors


def returns(walks: list[Walk]) -> list[list[float]]:
    return [[sum(walk.gains[turn:]) + walk.outcome for turn in range(walk.searches + 1)] for walk in walks]


def outcome_only(advantages):
    """An outcome estimator as one of turns: every turn of a trajectory gets the same number."""
    return lambda walks: [[value] * (walk.searches + 1) for walk, value in zip(walks, advantages([w.outcome for w in walks]), strict=True)]


def published_order(walks: list[Walk]) -> list[list[float]]:
    """IGPO's order without scale: subtract the mean gain first, then sum over the remaining turns."""
    return igpo_turn_advantages([walk.gains for walk in walks], [walk.outcome for walk in walks], divide_by_std=False)


def leave_one_out(walks: list[Walk]) -> list[list[float]]:
    return igpo_loo_turn_advantages([walk.gains for walk in walks], [walk.outcome for walk in walks])


UNIT_SCALE = Process(gains=(1.0, 1.0), outcomes=(0.5, 0.5, 0.5))
"""Every search gains 1 and answers earn the same, so no group has a spread to divide by and igpo_loo keeps the natural scale."""

OUTCOMES = Process(gains=(0.0, 0.0), outcomes=(0.0, 1.0, 0.4))
"""Only the answer is rewarded, best after one search."""


@pytest.mark.parametrize(
    ("process", "estimator", "expected_factor"),
    [
        (UNIT_SCALE, returns, 1.0),  # no baseline: unbiased, the Monte-Carlo truth of the harness itself
        (UNIT_SCALE, leave_one_out, 1.0),
        (OUTCOMES, outcome_only(rloo_advantages), 1.0),
        # A mean that contains the trajectory itself shrinks every gradient by (n - 1) / n, in every direction alike.
        (OUTCOMES, published_order, (GROUP - 1) / GROUP),
    ],
    ids=["returns", "igpo_loo", "rloo", "group_mean"],
)
def test_the_mean_gradient_is_the_true_one(process, estimator, expected_factor):
    means, errors = estimated_gradient(process, estimator)
    for mean, error, truth in zip(means, errors, true_gradient(process), strict=True):
        assert abs(truth) > 10 * error, "too few groups to see a bias"
        assert mean == pytest.approx(expected_factor * truth, abs=4 * error)


def test_the_published_order_takes_the_mean_gain_away_once_per_remaining_turn():
    """Gains of 1 each: the mean is 1, every centred gain is 0, and nothing is left of a true gradient that rewards searching. In general
    a walk's advantage from turn t loses mean gain x remaining searches, which depends on what it did: a baseline that is none."""
    truth = true_gradient(UNIT_SCALE)
    means, _ = estimated_gradient(UNIT_SCALE, published_order, groups=200)
    assert min(truth) > 0.1
    assert means == [0.0, 0.0]

    walks = [Walk(2, [3.0, 1.0], 0.0), Walk(1, [2.0], 0.0), Walk(0, [], 0.0)]
    mean_gain = 2.0
    for walk, row, published in zip(walks, returns(walks), published_order(walks), strict=True):
        bias = [got - value for got, value in zip(published, row, strict=True)]
        assert bias == pytest.approx([-mean_gain * (walk.searches - turn) for turn in range(walk.searches + 1)])


def test_the_published_order_turns_a_gradient_around():
    """The second search gains less than the mean though it gains: the published order makes it look bad, leave-one-out does not."""
    process = Process(gains=(1.0, 0.2), outcomes=(0.0, 0.0, 0.0))
    truth = true_gradient(process)
    published, published_errors = estimated_gradient(process, published_order)
    ours, errors = estimated_gradient(process, leave_one_out)
    assert truth[1] > 0
    assert published[1] < -10 * published_errors[1]
    assert ours[1] > 10 * errors[1]


@pytest.mark.parametrize("extra_turns", [0, 1, 2])
def test_under_constant_reward_an_extra_turn_earns_nothing_with_igpo_loo(extra_turns):
    """Gains of 0 and equal outcomes: however long, a walk and each of its turns have advantage 0 up to where the others ended."""
    walks = [Walk(1, [0.0], 0.7), Walk(1, [0.0], 0.7), Walk(1 + extra_turns, [0.0] * (1 + extra_turns), 0.7)]
    assert [value for row in leave_one_out(walks) for value in row[:2]] == pytest.approx([0.0] * 6, abs=1e-12)


def test_under_constant_reward_the_mean_gradient_of_igpo_loo_is_zero():
    """Later turns are compared with walks already over (0), so single advantages are not 0 there, but their mean gradient is."""
    constant = Process(gains=(0.0, 0.0), outcomes=(0.7, 0.7, 0.7))
    means, errors = estimated_gradient(constant, leave_one_out)
    assert true_gradient(constant) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert all(abs(mean) <= 4 * error for mean, error in zip(means, errors, strict=True))


def random_group(draw: random.Random, size: int = 6) -> RolloutGroup:
    """Trajectories of one to three turns; tool results come from a set of two, so states repeat."""
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1])])
    for _ in range(size):
        turns, path = draw.randint(1, 3), [0]
        for turn in range(1, turns + 1):
            path.append(group.add(Node(path[-1], "action", [2] * draw.randint(1, 3), turn)))
            if turn < turns:
                path.append(group.add(Node(path[-1], "observation", [draw.randint(7, 8)], turn)))
        gains = [draw.gauss(0, 1) for _ in range(turns - 1)]
        group.trajectories.append(Trajectory(path, Status.FINISHED, reward=draw.random(), gains=[*gains, None]))
    return group


def assigned(groups: list[RolloutGroup], config) -> None:
    entry = ADVANTAGES[config.name]
    for group in groups:
        entry.function(group, config, 0.0)
    if entry.over_batch:
        entry.over_batch(groups)


CONFIGS = [Igpo(), IgpoLoo(), Grpo(), Rloo(), GiGpo(), ReinforcePp(), ReinforcePpBaseline()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_order_of_trajectories_and_groups_changes_nothing(config):
    groups = [random_group(random.Random(seed)) for seed in range(3)]
    assigned(groups, config)
    before = {id(trajectory): trajectory.turn_advantages for group in groups for trajectory in group.trajectories}
    random.Random(0).shuffle(groups)
    for group in groups:
        random.Random(1).shuffle(group.trajectories)
    assigned(groups, config)
    for group in groups:
        for trajectory in group.trajectories:
            assert trajectory.turn_advantages == pytest.approx(before[id(trajectory)], abs=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_packing_changes_no_tokens_weight_and_advantage(config):
    """One row for all, or cut into rows of a few tokens: every action node keeps its weight and advantages."""
    groups = [random_group(random.Random(seed)) for seed in range(3)]
    assigned(groups, config)

    def by_node(row_tokens: int) -> dict[tuple[int, int], list[float]]:
        found = {}
        for row in pack_for_training(groups, row_tokens=row_tokens, token_weight=lambda tokens: 1.0 / tokens):
            for group, node, start, stop in row.origin:
                assert (group, node) not in found
                found[group, node] = [*row.advantages[start:stop].flatten().tolist(), *row.weight[start:stop].tolist()]
        return found

    whole = by_node(1000)
    assert whole == by_node(12)
    assert len(whole) == sum(node.kind == "action" for group in groups for node in group.nodes)


def test_gigpo_in_a_process_of_one_state_is_reinforce_with_two_equal_baselines():
    """One state and one turn: both parts compare the same outcomes, so the advantage is (1 + step_weight) times GRPO's."""
    outcomes = [1.0, 0.0, 0.25]
    got = gigpo_turn_advantages([["q"]] * 3, outcomes, gamma=0.9, step_weight=0.5, divide_by_std=False)
    mean = fmean(outcomes)
    assert [turns[0] for turns in got] == pytest.approx([1.5 * (value - mean) for value in outcomes])
