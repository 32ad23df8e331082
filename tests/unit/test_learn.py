"""What a step makes of its groups before the optimizer sees them: who counts, in which part, at which rate, with which advantages."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from igpo_megatron.algorithms.advantages.outcome import scale_by_informative, whiten
from igpo_megatron.algorithms.advantages.registry import ADVANTAGES, set_advantages
from igpo_megatron.algorithms.info_gain import add_probes, turn_gains
from igpo_megatron.algorithms.losses.clipped import Bapo
from igpo_megatron.algorithms.losses.registry import LOSSES, LossEntry, denominator, objective
from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.config.load import build
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy.policy import StepResult, learning_rate
from igpo_megatron.policy.schedule import tokens_of
from igpo_megatron.policy.settings import Optim
from igpo_megatron.training.checks import check
from igpo_megatron.training.queue import has_equal_rewards
from igpo_megatron.training.step import bounds_of_step, minibatches, shuffled_parts, update_metrics
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, StepCounts, Trajectory


def group_of(*rewards: float, name: str = "q", empty: int = 0) -> RolloutGroup:
    """A trajectory of two sampled tokens per reward, behind `empty` ones whose prompt left no room for a turn."""
    group = RolloutGroup(Prompt(name, "?", ("a",), "t"), [Node(None, "prompt", [1, 2]), Node(0, "forced", [3], 1)])
    group.trajectories = [Trajectory([0, 1], Status.TRUNCATED_CONTEXT, reward=-2.0) for _ in range(empty)]
    for reward in rewards:
        action = group.add(Node(1, "action", [4, 5], 1, behavior_logprobs=[-1.0, -1.0]))
        parts = {"f1": reward, "em": reward, "format_ok": 1.0}
        group.trajectories.append(Trajectory([0, 1, action], Status.FINISHED, reward=reward, reward_parts=parts, turn_advantages=[1.0]))
    return group


class Recorder:
    """A policy that notes what it is asked to train, and at which rate."""

    row_multiple, has_reference, shape, ranks = 1, False, SimpleNamespace(mixture=None), SimpleNamespace(data_size=1)

    def __init__(self, *overrides: str) -> None:
        self.config = build({"model": {"path": "m"}, "loss": {"kl_coef": 0.0}}, [*overrides])
        self.steps_taken, self.total_steps = 0, self.config.run.steps * self.config.optim.minibatches
        self.rates: list[float] = []
        self.sizes: list[int] = []

    def forward_backward(self, rows: list, objective: object) -> list:
        return rows

    def optimizer_step(self, rows: list) -> StepResult:
        self.rates.append(learning_rate(self.steps_taken, self.total_steps, self.config.optim))
        self.sizes.append(len({part[0] for row in rows for part in row.origin}))
        self.steps_taken += 1
        return StepResult(0.0, 1.0, False, {"tokens": 1.0})


def update(policy: Recorder, groups: list[RolloutGroup]) -> dict[str, float]:
    """As the training loop does it."""
    results = []
    for rows, trained in minibatches(policy, groups):
        results.append(policy.optimizer_step(policy.forward_backward(rows, trained)))
    return update_metrics(policy, results)


# ---- trajectories without a sampled token


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_trajectory_without_a_sampled_token_changes_nothing_of_a_step(aggregation):
    def trained(groups):
        counts = step_counts(groups)
        weight = {"sequence_mean": lambda n: 1.0 / n}.get(aggregation, lambda n: 1.0)
        (row,) = pack_for_training(groups, row_tokens=64, token_weight=weight)
        return denominator(aggregation, counts), row.token_ids.tolist(), row.weight.tolist(), row.advantages.tolist()

    assert trained([group_of(1.0, 0.0, empty=2), group_of(empty=3)]) == trained([group_of(1.0, 0.0)])
    assert trained([group_of(1.0, 0.0)]) != trained([group_of(1.0, 0.0), group_of(1.0)])


def test_an_action_of_no_tokens_alone_is_no_trained_trajectory():
    group = group_of(1.0)
    nothing = group.add(Node(1, "action", [], 1))
    group.trajectories.append(Trajectory([0, 1, nothing], Status.BAD_FORMAT, reward=-2.0))
    assert group.trained == group.trajectories[:1] and step_counts([group]).trajectories == 1
    add_probes(group, lambda answer: ([7, 8], (0, 2)), Reward())
    for node in group.nodes:
        node.old_logprobs = [-1.0] * 2 if node.kind == "probe" else []
    turn_gains(group, Reward())
    assert sum(len(row.targets) for row in pack_for_scoring([group], row_tokens=64)) == 2 + 2


def test_a_rank_without_groups_asks_no_function_over_the_batch(monkeypatch):
    """A user's own might take the mean of nothing."""
    seen = []
    entry = SimpleNamespace(function=lambda *_: None, over_batch=lambda groups: seen.append(len(groups)))
    monkeypatch.setattr("igpo_megatron.algorithms.advantages.registry.entry_of", lambda config: entry)
    for groups in ([], [group_of(1.0)]):
        set_advantages(groups, None, 0.0)
    assert seen == [1]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_advantage_sees_a_trajectory_without_a_sampled_token(name):
    config = build({"model": {"path": "m"}}, [f"advantage.name={name}"]).advantage

    def advantages(groups):
        for group in groups:
            group.metrics["greedy_reward"] = 0.25
            for trajectory in group.trajectories:
                trajectory.gains = [None] * len(group.actions(trajectory))
        set_advantages(groups, config, 0.0)
        return [trajectory.turn_advantages for group in groups for trajectory in group.trajectories if group.actions(trajectory)]

    # The group without turns would be a group of equal rewards in RAPO's count, which doubles what the informative one is scaled by.
    found = advantages([group_of(1.0, 0.0, empty=2), group_of(empty=2)])
    assert found == advantages([group_of(1.0, 0.0)]) and any(value for turns in found for value in turns)


def test_over_batch_statistics_are_those_of_the_formulas():
    groups = [group_of(1.0, 0.0, empty=1), group_of(0.5, 0.5), group_of(empty=2)]
    scale_by_informative(groups)
    assert [end.turn_advantages for end in groups[0].trained] == [[2.0], [2.0]], "two groups are trained, one of them is informative"
    for group, value in zip(groups[:2], (3.0, 1.0), strict=True):
        for end in group.trained:
            end.turn_advantages = [value]
    whiten(groups)
    assert [end.turn_advantages for group in groups for end in group.trained] == [
        pytest.approx([sign], abs=1e-6) for sign in (1, 1, -1, -1)
    ]


def test_metrics_and_resampling_leave_out_trajectories_without_a_sampled_token():
    group = group_of(1.0, 0.5, empty=2)
    found = rollout_metrics([group])
    assert (found["reward"], found["f1"], found["turns"], found["response_tokens"]) == (0.75, 0.75, 1.0, 2.0)
    assert found["truncated"] == 0.5
    assert has_equal_rewards(group_of(1.0, empty=2)) and not has_equal_rewards(group)


def test_a_success_takes_the_place_of_a_trajectory_that_was_trained():
    buffer = SuccessBuffer(4, 0.0)
    buffer.exchange([group_of(1.0)], 1)
    for step in range(2, 30):
        (group,) = buffer.exchange([group_of(0.0, 0.0, empty=3)], step)
        assert [end.reward for end in group.trajectories[:3]] == [-2.0] * 3 and len(group.trained) == 2
    (group,) = buffer.exchange([group_of(empty=3)], 30)
    assert not group.trained


def test_a_step_trains_beside_a_question_that_leaves_no_room_for_a_turn():
    policy = Recorder("rollout.prompts_per_step=2")
    assert update(policy, [group_of(1.0), group_of(empty=2)])["loss"] == 0.0 and policy.steps_taken == 1


# ---- parts of a step, and the schedule


@pytest.mark.parametrize(("questions", "count"), [(32, 20), (5, 4), (32, 12), (7, 7), (3, 1), (2, 5)])
def test_a_step_has_exactly_as_many_parts_as_asked_for_and_they_are_near_equal(questions, count):
    groups = [group_of(1.0, name=str(number)) for number in range(questions)]
    parts = shuffled_parts(groups, count, key="0 0")
    sizes = [len(part) for part in parts]
    assert len(parts) == count and max(sizes) - min(sizes) <= 1
    assert sorted(int(group.prompt.id) for part in parts for group in part) == list(range(questions))


def test_groups_that_were_sampled_last_do_not_gather_in_the_last_part():
    groups = [group_of(1.0, name=str(number)) for number in range(64)]
    ids = lambda key: [[int(group.prompt.id) for group in part] for part in shuffled_parts(groups, 4, key)]  # noqa: E731
    assert ids("7 16") == ids("7 16") != ids("7 20")
    late = [sum(number >= 48 for number in part) for part in ids("7 16")]
    assert max(late) < 10, "unshuffled, the last part would be all 16 of them"
    assert [group.prompt.id for group in groups] == [str(number) for number in range(64)], "the caller's list stays as it is"


@pytest.mark.parametrize(("questions", "count"), [(32, 20), (5, 4), (4, 4)])
def test_every_part_is_a_step_of_the_schedule_and_the_last_one_has_the_least_rate(questions, count):
    sizes = (f"rollout.prompts_per_step={questions}", f"optim.minibatches={count}", "run.steps=10")
    policy = Recorder(*sizes, "optim.lr=1.0", "optim.min_lr=0.1", "optim.decay=linear")
    for step in range(10):
        metrics = update(policy, [group_of(1.0) for _ in range(questions)])
        assert metrics["lr"] == pytest.approx(policy.rates[step * count])
    assert policy.steps_taken == len(policy.rates) == 10 * count and policy.rates[0] == 1.0 and policy.rates[-1] == pytest.approx(0.1)
    assert max(policy.sizes) - min(policy.sizes) <= 1


def test_a_part_of_which_nothing_is_trained_advances_the_schedule_all_the_same():
    policy = Recorder("rollout.prompts_per_step=4", "optim.minibatches=4")
    metrics = update(policy, [group_of(1.0), group_of(empty=2), group_of(), group_of(1.0, 0.0)])
    assert (policy.steps_taken, len(policy.rates), metrics["skipped"]) == (4, 2, 2.0)
    assert update(policy, [group_of(empty=1)] * 4) == {"skipped": 4.0, "lr": 1e-6} and policy.steps_taken == 8


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("start", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("warmup", [0, 3, 9])
@pytest.mark.parametrize("count", [1, 4])
def test_every_decay_ends_at_min_lr_at_the_last_step(decay, start, warmup, count):
    optim = Optim(lr=2.0, min_lr=0.5, decay=decay, decay_from=start, warmup_steps=warmup, minibatches=count)
    rates = [learning_rate(step, 10 * count, optim) for step in range(10 * count)]
    assert rates[-1] == 0.5 and max(rates) == 2.0
    top = rates.index(2.0)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top == max(warmup * count - 1, 0)
    assert all(rate == 2.0 for rate in rates[top : int(max(10 * count * start, warmup * count))])


def test_halfway_through_its_decay_the_rate_is_halfway_whatever_the_form():
    for decay in ("linear", "cosine"):
        optim = Optim(lr=1.0, min_lr=0.2, decay=decay)
        assert learning_rate(50, 101, optim) == pytest.approx(0.6)
    assert learning_rate(25, 101, optim) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(0, 1, optim) == 1.0, "the only step of a run is not one of rate 0"


def test_warmup_counts_training_steps_in_the_schedule_and_in_its_check():
    optim = Optim(lr=1.0, warmup_steps=286, minibatches=2)
    rates = [[learning_rate(2 * step + part, 2010, optim) for part in (0, 1)] for step in range(1005)]
    assert next(step for step, pair in enumerate(rates, start=1) if pair[-1] >= 1.0) == 286
    assert rates[0] == pytest.approx([1 / 572, 2 / 572]) and rates[142][-1] == pytest.approx(0.5)

    def complaints(*overrides):
        found = check(build({"model": {"path": "m"}}, ["run.steps=100", "optim.minibatches=8", *overrides]), world_size=1)
        return [problem for problem in found if problem.startswith("optim")]

    assert complaints("optim.warmup_steps=100") == [] == complaints("optim.warmup_steps=99", "optim.decay=linear")
    assert "is more than run.steps=100" in complaints("optim.warmup_steps=101")[0]
    assert "leaves none for optim.decay=linear" in complaints("optim.warmup_steps=100", "optim.decay=linear")[0]


# ---- BAPO


def share_of_positive(advantages, ratio, lower, upper):
    gained = (advantages[:, 0] * ratio.clamp(max=upper)).sum()
    lost = (advantages[:, 1] * ratio.clamp(min=lower)).sum()
    return float(gained / (gained + lost))


@pytest.mark.parametrize(
    ("mismatch", "disputed", "ends"),
    [("none", 150, False), ("truncate", 150, False), ("mask", 60, False), ("mask", 150, True), ("mask_sequence", 150, True)],
)
def test_bapo_balances_the_advantages_that_the_loss_trains(mismatch, disputed, ends, monkeypatch):
    """The engine disagrees on some of the 200 positive tokens, beside 200 negative ones; recomputed here with plain tensors.

    Of 140 positive ones the bounds can make their share by moving a little; 50 are too few wherever they stand.
    """
    generator = torch.Generator().manual_seed(0)
    n = 400
    advantages = torch.zeros(n, 2)
    advantages[:200, 0] = advantages[200:, 1] = 1.0
    old = torch.full((n,), -1.0)
    gap = torch.zeros(n)
    gap[:disputed] = 2.0
    sequence = torch.arange(n) // 50
    now = old + 0.3 * torch.randn(n, generator=generator)
    config = Bapo(mismatch=mismatch)
    known = {"old_logprobs": old, "behavior_logprobs": old - gap, "advantages": advantages, "weight": torch.ones(n)}
    row = SimpleNamespace(**known, sequence=sequence, sequences=n // 50, ref_logprobs=None, old_entropies=None)
    lower, upper = bounds_of_step(SimpleNamespace(log_probs=lambda rows: [now]), [row], config)

    weight = gap.exp()
    factor = {
        "none": torch.ones(n),
        "mask": torch.where(weight > 2.0, 0.0, weight),
        "truncate": weight.clamp(max=2.0),
        "mask_sequence": torch.where(gap > 0, 0.0, 1.0),
    }[mismatch]
    trained = advantages * factor[:, None]
    at_ends = (lower, upper) == (pytest.approx(config.lower[1]), pytest.approx(config.upper[1]))
    assert at_ends == ends
    assert (share_of_positive(trained, (now - old).exp(), lower, upper) >= config.positive_share) != ends

    seen = {}
    look = LossEntry(Bapo, lambda tokens, counts, config: (seen.update(advantages=tokens.advantages) or tokens.logprobs.sum(), {}))
    monkeypatch.setitem(LOSSES, "bapo", look)
    objective(tokens_of(row, now), StepCounts(n, 8), config.model_copy(update={"kl_coef": 0.0}))
    assert torch.equal(seen["advantages"], trained), "what the bounds balance is what the loss is given"


def test_the_shuffle_of_a_step_depends_on_seed_and_step_alone():
    def trained(seed: int, taken: int) -> list[int]:
        policy = Recorder("rollout.prompts_per_step=8", "optim.minibatches=8", f"run.seed={seed}")
        policy.steps_taken = taken
        order: list[int] = []
        policy.optimizer_step = lambda rows: order.append(len(rows[0].targets)) or StepResult(0.0, 1.0, False, {"tokens": 1.0})
        groups = [group_of(*[1.0] * (number + 1), name=str(number)) for number in range(8)]
        random.seed(taken)  # what else draws numbers is no matter
        update(policy, groups)
        return order

    assert trained(0, 16) == trained(0, 16)
    assert trained(0, 16) != trained(0, 24) and trained(0, 16) != trained(1, 16)
