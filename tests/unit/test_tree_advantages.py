"""ARPO's advantages on trees, the entropy statistics of a step, and AEPO's loss, against numbers worked by hand."""

import math
from dataclasses import replace

import pytest
import torch

from igpo_megatron.algorithms.advantages.registry import set_advantages
from igpo_megatron.algorithms.advantages.tree import Arpo, arpo_advantages, entropy_stats
from igpo_megatron.algorithms.losses.entropy import Aepo
from igpo_megatron.algorithms.losses.registry import Ppo, objective
from igpo_megatron.algorithms.losses.tokens import Tokens
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.types import EntropyStats, Node, Prompt, RolloutGroup, StepCounts, Trajectory
from igpo_megatron.types import Status as End


def forked(rewards=(1.0, 0.0, 0.0, 1.0), status=End.FINISHED):
    """Paths 0, 1 and 2 share their first turn; 1 and 2 their second, too; path 3 stands alone. Two tokens a turn."""
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1])])

    def act(parent, turn):
        return group.add(Node(parent, "action", [2, 3], turn, old_entropies=[float(turn), 0.0]))

    first = act(0, 1)
    second = act(first, 2)
    paths = [[0, first, act(first, 2)], [0, first, second, act(second, 3)], [0, first, second, act(second, 3)], [0, act(0, 1)]]
    group.trajectories = [Trajectory(path, End.FINISHED, reward=reward) for path, reward in zip(paths, rewards, strict=True)]
    group.trajectories[0].status = status
    return group


def test_the_z_score_divides_by_the_sample_deviation():
    """Rewards 1 0 0 1: mean 1/2, squares 4 x 1/4 over n - 1 = 3."""
    assert arpo_advantages([1.0, 0.0, 0.0, 1.0])[:2] == pytest.approx([0.5 / math.sqrt(1 / 3), -0.5 / math.sqrt(1 / 3)], rel=1e-5)
    assert arpo_advantages([0.7]) == [0.0] and arpo_advantages([0.7, 0.7]) == [0.0, 0.0]


def test_soft_attribution_gives_every_trajectory_its_own_number_and_hard_the_mean_where_turns_are_shared():
    soft, hard = forked(), forked()
    set_advantages([soft], Arpo(), 0.0)
    set_advantages([hard], Arpo(attribution="hard"), 0.0)
    a = 0.5 / math.sqrt(1 / 3)
    assert [end.turn_advantages for end in soft.trajectories] == [
        pytest.approx(row, rel=1e-4) for row in ([a, a], [-a, -a, -a], [-a, -a, -a], [a])
    ]
    # The first turn: (a - a - a) / 3; the second of paths 1 and 2: (-a - a) / 2.
    assert [end.turn_advantages for end in hard.trajectories] == [
        pytest.approx(row, rel=1e-4) for row in ([-a / 3, a], [-a / 3, -a, -a], [-a / 3, -a, -a], [a])
    ]


def test_a_failed_trajectory_takes_no_part_in_a_shared_turn():
    group = forked(status=End.TOOL_FAILED)
    set_advantages([group], Arpo(attribution="hard"), 0.0)
    first, second, third, fourth = (end.turn_advantages for end in group.trajectories)
    assert first == [0.0, 0.0] and second == pytest.approx([second[0]] * 3) and second == third and second[0] < 0 < fourth[0]


def test_shared_turns_are_trained_once_with_the_sum_of_both_signs():
    group = forked()
    set_advantages([group], Arpo(), 0.0)
    (row,) = pack_for_training([group], row_tokens=100, token_weight=lambda n: 1.0)
    a = 0.5 / math.sqrt(1 / 3)
    assert len(row.targets) == 2 * 6 and step_counts([group]).trained_tokens == 2 * 9
    assert row.weight[0] == 3.0 and row.advantages[0].tolist() == pytest.approx([a, 2 * a], rel=1e-4)
    assert row.old_entropies[:2].tolist() == [1.0, 0.0]


def test_statistics_of_entropies_count_a_shared_token_for_each_of_its_trajectories():
    """Turns: 3 x (1, 0), then 1 + 2 x (2, 0), 2 x (3, 0), and 1 x (1, 0): 9 zeros, 4 ones, 3 twos, 2 threes. Sum 16, squares 34."""
    stats = entropy_stats([forked()], 0.2)
    assert stats.mean == pytest.approx(16 / 18) and stats.std == pytest.approx(math.sqrt((34 - 16**2 / 18) / 17))
    assert (stats.lowest, stats.highest) == (0.0, 3.0)
    assert stats.threshold == 2.0 and entropy_stats([forked()], 1.0).threshold == -math.inf
    # The same statistics over two groups, whatever rows they will lie in.
    assert entropy_stats([forked(), forked()], 0.2).mean == pytest.approx(stats.mean)


def run(config, ratios, advantages, *, entropies=None, stats=None, old=-1.0, **tensors):
    """(loss, gradient per log-prob) of tokens with given ratios and signed advantages, one trajectory."""
    old_logprobs = torch.full((len(ratios),), old)
    logprobs = (old_logprobs + torch.tensor(ratios).log()).requires_grad_()
    signed = torch.tensor(advantages)
    extra = {} if entropies is None else {"old_entropies": torch.tensor(entropies)}
    tokens = Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], -1),
        weight=torch.ones(len(ratios)),
        **tensors,
        **extra,
    )
    value, metrics = objective(tokens, StepCounts(len(ratios), 1, stats), config)
    value.backward()
    return value.item(), logprobs.grad, metrics


PLAIN = {"kl_coef": 0.0, "aggregation": "token_mean"}
CASES = ([1.5, 0.5, 1.1, 1.5, 0.5, 4.0, 1.0], [2.0, 2.0, 2.0, -2.0, -2.0, -2.0, 1.0])


def test_the_balanced_clip_has_ppos_value_and_keeps_a_bounded_gradient():
    """F = 1.2 where r > 1.2 and A > 0; 0 where r < 0.8 and A < 0, or r > 3 and A < 0; r elsewhere. Gradient: -A F / 7."""
    value, gradient, _ = run(Aepo(**PLAIN, entropy_advantage="none"), *CASES)
    plain, _, _ = run(Ppo(**PLAIN), *CASES)
    factors = [1.2, 0.5, 1.1, 1.5, 0.0, 0.0, 1.0]
    assert value == pytest.approx(plain)
    assert gradient.tolist() == pytest.approx([-a * f / 7 for a, f in zip(CASES[1], factors, strict=True)], rel=1e-5)


def test_only_high_entropy_tokens_may_be_balanced():
    config = Aepo(**PLAIN, entropy_advantage="none", balanced_tokens="high_entropy")
    stats = EntropyStats(0.0, 1.0, threshold=1.0, lowest=0.0, highest=2.0)
    _, gradient, _ = run(config, [1.5, 1.5], [1.0, 1.0], entropies=[1.0, 1.1], stats=stats)
    assert gradient.tolist() == pytest.approx([0.0, -0.6])


def test_extreme_log_probs_cannot_make_inf_times_zero():
    for shift in (-300.0, 300.0):
        logprobs = torch.tensor([0.0, -300.0, -1.0], requires_grad=True)
        value, _ = objective(
            Tokens(
                logprobs=logprobs,
                old_logprobs=torch.tensor([shift, 0.0, -1.0]),
                advantages=torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
                weight=torch.ones(3),
            ),
            StepCounts(3, 1),
            Aepo(**PLAIN, entropy_advantage="none"),
        )
        value.backward()
        assert value.isfinite() and logprobs.grad.isfinite().all()


def test_entropy_scales_advantages_by_the_step_s_statistics():
    """z = (H - 1) / 0.5 with a = 0.2: H 1 -> 1, H 2 -> 1.4, H 0 -> 0.6."""
    config, stats = Aepo(**PLAIN), EntropyStats(1.0, 0.5, 0.0, lowest=0.0, highest=2.0)
    _, gradient, _ = run(config, [1.0] * 3, [1.0, -1.0, 1.0], entropies=[1.0, 2.0, 0.0], stats=stats)
    assert gradient.tolist() == pytest.approx([-1 / 3, 1.4 / 3, -0.6 / 3])
    # A factor below zero turns an advantage round: a = 2, H = 0: 1 + 2 (-2) = -3.
    _, gradient, _ = run(config.model_copy(update={"entropy_advantage_weight": 2.0}), [1.0], [1.0], entropies=[0.0], stats=stats)
    assert gradient.tolist() == pytest.approx([3.0])


def test_published_statistics_are_those_of_the_micro_batch_and_depend_on_packing():
    config = Aepo(**PLAIN, entropy_advantage="published")
    entropy = torch.tensor([0.0, 1.0, 2.0])
    _, together, _ = run(config, [1.0] * 3, [1.0] * 3, entropy=entropy)
    assert together.tolist() == pytest.approx([-0.8 / 3, -1 / 3, -1.2 / 3])
    _, alone, _ = run(config, [1.0], [1.0], entropy=entropy[:1])
    assert alone.tolist() == pytest.approx([-1.0]), "in a row of its own the first token counts 1 instead of 0.8"


def test_the_entropy_advantage_cannot_be_switched_off_silently():
    """In the published scripts it never runs, for want of entropies."""
    with pytest.raises(AssertionError, match="needs old entropies"):
        run(Aepo(**PLAIN), [1.0], [1.0])
    with pytest.raises(AssertionError, match="needs the entropy"):
        run(Aepo(**PLAIN, entropy_advantage="published"), [1.0], [1.0])


def test_the_corrected_loss_does_not_depend_on_the_rows():
    group = forked()
    set_advantages([group], Arpo(), 0.0)
    counts = replace(step_counts([group]), entropy=entropy_stats([group], 0.2))
    totals = []
    for row_tokens in (3, 7, 100):
        rows = pack_for_training([group], row_tokens=row_tokens, token_weight=lambda n: 1.0)
        totals.append(
            sum(
                objective(
                    Tokens(
                        logprobs=row.old_logprobs - 1.0,
                        old_logprobs=row.old_logprobs,
                        advantages=row.advantages,
                        weight=row.weight,
                        old_entropies=row.old_entropies,
                    ),
                    counts,
                    Aepo(**PLAIN, balanced_tokens="high_entropy"),
                )[0].item()
                for row in rows
            )
        )
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-6)
