"""What the advantage estimators estimate: their mean policy gradient on small decision processes whose true gradient is known.

    turn t:  search (probability sigmoid(theta_t), brings a gain)  ──> next turn, or
             answer (earns the outcome) ──> over; the last turn always answers

A softmax policy over two actions makes every score function a number, so "the gradient" is a short vector and its bias can be measured.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pstdev

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
from igpo_megatron.algorithms.advantages.tree import Arpo
from igpo_megatron.algorithms.advantages.turn import (
    Eapo,
    Igpo,
    IgpoLoo,
    eapo_turn_advantages,
    igpo_loo_turn_advantages,
    igpo_turn_advantages,
)
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
        (OUTCOMES, outcome_only(lambda outcomes: [outcome - 0.4 for outcome in outcomes]), 1.0),  # a greedy sample's reward: constant
        # A mean that contains the trajectory itself shrinks every gradient by (n - 1) / n, in every direction alike.
        (OUTCOMES, published_order, (GROUP - 1) / GROUP),
        (OUTCOMES, outcome_only(partial(grpo_advantages, divide_by_std=False)), (GROUP - 1) / GROUP),
    ],
    ids=["returns", "igpo_loo", "rloo", "remax", "igpo_group_mean", "dr_grpo"],
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


def by_turn(walks: list[Walk], **settings) -> list[list[float]]:
    """GiGPO where the number of searches so far is the whole state."""
    states = [list(range(walk.searches + 1)) for walk in walks]
    return gigpo_turn_advantages(states, [walk.outcome for walk in walks], gamma=1.0, divide_by_std=False, **settings)


def test_the_mean_gradient_of_gigpo_is_the_true_one_up_to_a_factor_per_state():
    """The part within the group shrinks by (n - 1) / n. The part within a state has m ~ B(n, p) visits, whose own mean costs one of them:
    E[max(m - 1, 0)] / (n p) = (n p - 1 + (1 - p)^n) / (n p). Both parts point where the true gradient points."""
    means, errors = estimated_gradient(OUTCOMES, partial(by_turn, step_weight=0.5))
    for mean, error, truth, p in zip(means, errors, true_gradient(OUTCOMES), (1.0, sigmoid(THETA[0])), strict=True):
        within_state = (GROUP * p - 1 + (1 - p) ** GROUP) / (GROUP * p)
        assert mean == pytest.approx(((GROUP - 1) / GROUP + 0.5 * within_state) * truth, abs=4 * error)
        assert abs(truth) > 10 * error


def test_dividing_by_the_groups_deviation_forgets_how_much_is_at_stake():
    """The bias of GRPO's z-score: a question whose rewards are ten times larger has the same gradient. RLOO's is ten times larger."""
    small, large = (Process(OUTCOMES.gains, tuple(scale * value for value in OUTCOMES.outcomes)) for scale in (1.0, 10.0))
    assert true_gradient(large) == pytest.approx([10 * value for value in true_gradient(small)])
    z_scores = [estimated_gradient(process, outcome_only(grpo_advantages), groups=500)[0] for process in (small, large)]
    assert z_scores[0] == pytest.approx(z_scores[1], rel=1e-3)
    plain = [estimated_gradient(process, outcome_only(rloo_advantages), groups=500)[0] for process in (small, large)]
    assert plain[1] == pytest.approx([10 * value for value in plain[0]])


def test_an_average_over_tokens_is_a_baseline_that_depends_on_the_trajectory():
    """The bias of HAPO's token-level average: a long trajectory has more of itself in its own baseline, so directions shrink unequally
    (Dr. GRPO shrinks both by (n - 1) / n)."""

    def by_tokens(walks: list[Walk]) -> list[list[float]]:
        lengths = [walk.searches + 1 for walk in walks]
        values = token_weighted_advantages([walk.outcome for walk in walks], lengths, divide_by_std=False)
        return [[value] * length for value, length in zip(values, lengths, strict=True)]

    means, errors = estimated_gradient(OUTCOMES, by_tokens)
    factors = [mean / truth for mean, truth in zip(means, true_gradient(OUTCOMES), strict=True)]
    slack = [error / abs(truth) for error, truth in zip(errors, true_gradient(OUTCOMES), strict=True)]
    assert factors[0] - factors[1] > 5 * math.hypot(*slack)


def whitened_gradient(process: Process, config, groups: int, seed: int) -> list[float]:
    """Mean gradient of one large batch by an advantage that is normalised over the batch; every turn has one token. [turns]"""
    draw = random.Random(seed)
    batch = [[process.sample(draw) for _ in range(GROUP)] for _ in range(groups)]
    trees = [group_of(walks) for walks in batch]
    set_advantages(trees, config, 0.0)
    gradient = [0.0] * len(THETA)
    for walks, tree in zip(batch, trees, strict=True):
        for walk, trajectory in zip(walks, tree.trajectories, strict=True):
            for turn, score in enumerate(scores(walk.searches)):
                gradient[turn] += trajectory.turn_advantages[turn] * score / (GROUP * groups)
    return gradient


def group_of(walks: list[Walk]) -> RolloutGroup:
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1])])
    for walk in walks:
        path = [0]
        for turn in range(1, walk.searches + 2):
            path.append(group.add(Node(path[-1], "action", [2], turn)))
        group.trajectories.append(Trajectory(path, Status.FINISHED, reward=walk.outcome))
    return group


@pytest.mark.parametrize("config", [ReinforcePp(), ReinforcePpBaseline()], ids=lambda config: config.name)
def test_whitening_over_the_batch_only_scales_the_true_gradient(config):
    """Mean and deviation of a large batch are constants: a baseline, and a scale that all turns share. So the mean gradient points where
    the true one does, divided (without a baseline of the group's own) by the deviation of outcomes over tokens."""
    draws = [whitened_gradient(OUTCOMES, config, groups=300, seed=seed) for seed in range(12)]
    truth = true_gradient(OUTCOMES)
    scale = [fmean(column) / value for column, value in zip(zip(*draws, strict=True), truth, strict=True)]
    errors = [pstdev(column) / math.sqrt(len(draws)) / abs(value) for column, value in zip(zip(*draws, strict=True), truth, strict=True)]
    assert min(scale) > 10 * max(errors)
    assert scale[0] == pytest.approx(scale[1], abs=4 * math.hypot(*errors))
    tokens = [(walks + 1, OUTCOMES.probability(walks)) for walks in range(3)]
    length = sum(count * p for count, p in tokens)
    mean = sum(count * p * OUTCOMES.outcomes[walks] for walks, (count, p) in enumerate(tokens)) / length
    variance = sum(count * p * (OUTCOMES.outcomes[walks] - mean) ** 2 for walks, (count, p) in enumerate(tokens)) / length
    if isinstance(config, ReinforcePp):
        assert scale[0] == pytest.approx(1 / math.sqrt(variance), abs=4 * errors[0] + 0.01)


@pytest.mark.parametrize(
    "config",
    [Igpo(), Grpo(), Grpo(statistics="tokens"), Rloo(), Arpo(), GiGpo(gamma=1.0), Eapo(gamma=1.0), Rapo(), ReinforcePp(), ReMax()],
    ids=lambda config: config.name,
)
def test_under_constant_reward_no_turn_earns_anything(config):
    """Whatever the lengths. (igpo_loo and discounted returns: below.)"""
    group = group_of([Walk(searches, [0.0] * searches, 0.7) for searches in (0, 1, 1, 4)])
    for trajectory in group.trajectories:
        trajectory.gains = [*[0.0] * (len(trajectory.path) - 2), None]
    group.metrics[GREEDY_REWARD] = 0.7
    set_advantages([group], config, 0.0)
    assert [value for trajectory in group.trajectories for value in trajectory.turn_advantages] == pytest.approx([0.0] * 10, abs=1e-9)


def test_discounting_per_turn_makes_an_extra_turn_a_loss_under_constant_reward():
    """EAPO's intended bias: the true gradient is 0, its own is against searching on; without discount it is 0 again."""
    constant = Process(gains=(0.0, 0.0), outcomes=(1.0, 1.0, 1.0))

    def gradient(gamma: float) -> tuple[list[float], list[float]]:
        return estimated_gradient(
            constant,
            lambda walks: eapo_turn_advantages([walk.searches + 1 for walk in walks], [walk.outcome for walk in walks], gamma=gamma),
            groups=1000,
        )

    means, errors = gradient(0.5)
    assert all(mean < -10 * error for mean, error in zip(means, errors, strict=True))
    assert gradient(1.0)[0] == pytest.approx([0.0, 0.0], abs=1e-9)


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
    group.metrics[GREEDY_REWARD] = 0.4
    return group


CONFIGS = [
    Igpo(),
    IgpoLoo(),
    Grpo(),
    Grpo(statistics="tokens"),
    Rloo(),
    GiGpo(),
    Eapo(),
    Rapo(),
    Arpo(),
    ReinforcePp(),
    ReinforcePpBaseline(),
    ReMax(),
]


def test_every_advantage_is_checked_for_what_must_change_nothing():
    assert {type(config) for config in CONFIGS} == {entry.section for entry in ADVANTAGES.values()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_order_of_trajectories_and_groups_changes_nothing(config):
    groups = [random_group(random.Random(seed)) for seed in range(3)]
    set_advantages(groups, config, 0.0)
    before = {id(trajectory): trajectory.turn_advantages for group in groups for trajectory in group.trajectories}
    random.Random(0).shuffle(groups)
    for group in groups:
        random.Random(1).shuffle(group.trajectories)
    set_advantages(groups, config, 0.0)
    for group in groups:
        for trajectory in group.trajectories:
            assert trajectory.turn_advantages == pytest.approx(before[id(trajectory)], abs=1e-9)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_packing_changes_no_tokens_weight_and_advantage(config):
    """One row for all, or cut into rows of a few tokens: every action node keeps its weight and advantages."""
    groups = [random_group(random.Random(seed)) for seed in range(3)]
    set_advantages(groups, config, 0.0)

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
