"""Losses against numbers worked by hand and against one-trajectory-at-a-time formulas."""

from pathlib import Path

import pytest
import torch

from igpo_megatron.algorithms.losses.clipped import Bapo, Cispo, Gspo, balanced_bounds
from igpo_megatron.algorithms.losses.entropy import Hapo, entropy_position
from igpo_megatron.algorithms.losses.registry import LOSSES, Ppo, Sft, denominator, mismatch_factor, objective, token_weight
from igpo_megatron.algorithms.losses.tokens import Tokens, k3, sequence_mean
from igpo_megatron.types import EntropyStats, StepCounts

PLAIN = Ppo(kl_coef=0.0, aggregation="token_mean")


def ppo_on(ratios, advantages, config=PLAIN, weight=None, tokens=None, counts=None, **kwargs):
    """Loss of tokens with given ratios (old log-prob -1) and signed advantages, with the gradient for each log-prob."""
    old = torch.full((len(ratios),), -1.0)
    logprobs = (old + torch.tensor(ratios).log()).requires_grad_()
    signed = torch.tensor(advantages)
    known = Tokens(
        logprobs=logprobs,
        old_logprobs=old,
        advantages=torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], dim=-1),
        weight=torch.ones(len(ratios)) if weight is None else torch.tensor(weight),
        **kwargs,
    )
    loss, metrics = objective(known, counts or StepCounts(trained_tokens=tokens or len(ratios), trajectories=1), config)
    loss.backward()
    return loss.item(), logprobs.grad, {name: value.item() for name, value in metrics.items()}


def test_ppo_clips_by_the_sign_of_the_advantage():
    """Bounds 0.8 and 1.3, dual 3. A = +2: r 1.5 -> 1.3, r 0.5 -> 0.5. A = -2: r 0.5 -> 0.8, r 1.5 -> 1.5, r 4 -> 3.
    Loss: (-2.6 - 1 + 1.6 + 3 + 6) / 5. Only the unclipped tokens have a gradient: -A r / 5."""
    config = PLAIN.model_copy(update={"clip_high": 0.3})
    loss, gradient, metrics = ppo_on([1.5, 0.5, 0.5, 1.5, 4.0], [2.0, 2.0, -2.0, -2.0, -2.0], config)
    assert loss == pytest.approx(7.0 / 5)
    assert gradient.tolist() == pytest.approx([0.0, -0.2, 0.0, 0.6, 0.0])
    assert metrics["clip_fraction"] == 3.0
    assert metrics["tokens"] == 5.0


def test_dual_clip_can_be_off():
    loss, gradient, metrics = ppo_on([4.0], [-2.0], PLAIN.model_copy(update={"dual_clip": None}))
    assert loss == pytest.approx(8.0)
    assert gradient.item() == pytest.approx(8.0)
    assert metrics["clip_fraction"] == 0.0


def test_on_policy_tokens_keep_their_full_gradient_even_with_closed_bounds():
    config = PLAIN.model_copy(update={"clip_low": 0.0, "clip_high": 0.0})
    _, gradient, _ = ppo_on([1.0, 1.0], [1.0, -1.0], config)
    assert gradient.tolist() == [-0.5, 0.5]


def per_trajectory_ppo(logprobs, old, trajectories, config, count):
    """The published token loss, trajectory by trajectory: `trajectories` are (token indices, weight, advantage)."""
    ratio = (logprobs - old).exp()
    total = logprobs.new_zeros(())
    for indices, weight, advantage in trajectories:
        r = ratio[indices]
        token_loss = torch.maximum(-advantage * r, -advantage * r.clamp(1 - config.clip_low, 1 + config.clip_high))
        if advantage < 0:
            token_loss = torch.minimum(token_loss, torch.full_like(token_loss, -advantage * config.dual_clip))
        total = total + weight * token_loss.sum()
    return total / count


def shared_tokens_case():
    """Twelve trajectories of mixed sign through random halves of 64 tokens, ratios from far below to far above every bound."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(64, generator=generator, dtype=torch.float64) * 3
    logprobs = old + torch.randn(64, generator=generator, dtype=torch.float64)
    trajectories = []
    for _ in range(12):
        indices = torch.randperm(64, generator=generator)[:32]
        advantage = torch.randn((), generator=generator, dtype=torch.float64).item()
        trajectories.append((indices, token_weight("sequence_mean", len(indices)), advantage))
    return old, logprobs, trajectories


@pytest.mark.parametrize(("combine_by_sign", "agrees"), [(True, True), (False, False)])
def test_shared_tokens_have_the_loss_and_gradient_of_every_trajectory_through_them(combine_by_sign, agrees):
    """Summing positive and negative parts apart is exact; summing signed advantages first (they cancel) is not."""
    config = Ppo(clip_low=0.2, clip_high=0.28, dual_clip=2.0, kl_coef=0.0, aggregation="sequence_mean")
    old, values, trajectories = shared_tokens_case()
    parts = torch.zeros(64, 2, dtype=torch.float64)
    weight = torch.zeros(64, dtype=torch.float64)
    for indices, share, advantage in trajectories:
        parts[indices, 0] += share * max(advantage, 0.0)
        parts[indices, 1] += share * max(-advantage, 0.0)
        weight[indices] += share
    if not combine_by_sign:
        signed = parts[:, 0] - parts[:, 1]
        parts = torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], dim=-1)

    logprobs = values.clone().requires_grad_()
    loss, metrics = objective(
        Tokens(logprobs=logprobs, old_logprobs=old, advantages=parts, weight=weight),
        StepCounts(trained_tokens=12 * 32, trajectories=12),
        config,
    )
    loss.backward()
    reference = values.clone().requires_grad_()
    expected = per_trajectory_ppo(reference, old, trajectories, config, 12)
    expected.backward()

    assert torch.allclose(loss, expected, rtol=1e-10) is agrees
    assert torch.allclose(logprobs.grad, reference.grad, rtol=1e-10, atol=1e-14) is agrees
    assert metrics["clip_fraction"] > 10


def test_kl_and_entropy_terms_are_weighted_and_signed():
    """k3 of d = ref - logprob = 1 is e - 2. Weights 1 and 3, entropies 2 and 0.5: KL sum 4 (e - 2), entropy sum 3.5; over 4 tokens."""
    config = PLAIN.model_copy(update={"kl_coef": 0.1, "entropy_coef": 0.01})
    loss, gradient, metrics = ppo_on(
        [1.0, 1.0], [0.0, 0.0], config, weight=[1.0, 3.0], tokens=4, ref_logprobs=torch.zeros(2), entropy=torch.tensor([2.0, 0.5])
    )
    e = 2.718281828
    assert loss == pytest.approx((0.1 * 4 * (e - 2) - 0.01 * 3.5) / 4, rel=1e-5)
    # d k3 / d logprob = 1 - e^d: minimising pulls the log-prob up towards the reference.
    assert gradient.tolist() == pytest.approx([0.1 * (1 - e) / 4, 0.3 * (1 - e) / 4], rel=1e-5)
    assert metrics["kl_ref"] == pytest.approx(2 * (e - 2), rel=1e-5)
    assert metrics["entropy"] == pytest.approx(2.5)


def test_a_coefficient_without_its_tensor_is_refused():
    with pytest.raises(AssertionError, match="kl_coef needs"):
        ppo_on([1.0], [1.0], PLAIN.model_copy(update={"kl_coef": 0.1}))
    with pytest.raises(AssertionError, match="entropy_coef needs"):
        ppo_on([1.0], [1.0], PLAIN.model_copy(update={"entropy_coef": 0.1}))


def test_k3_is_capped_at_ten_without_gradient_beyond():
    difference = torch.tensor([0.0, 1.0, -1.0, 5.0, -15.0, 500.0, -500.0], requires_grad=True)
    values = k3(difference)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.0, 0.718282, 0.367879, 10.0, 10.0, 10.0, 10.0], abs=1e-5)
    assert difference.grad.tolist() == pytest.approx([0.0, 1.718282, -0.632121, 0.0, 0.0, 0.0, 0.0], abs=1e-5)


def test_extreme_log_probs_leave_finite_gradients():
    logprobs = torch.tensor([0.0, 0.0, -300.0], requires_grad=True)
    loss, _ = objective(
        Tokens(
            logprobs=logprobs,
            old_logprobs=torch.tensor([-300.0, -300.0, 0.0]),
            ref_logprobs=torch.tensor([-300.0, 0.0, 0.0]),
            advantages=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
            weight=torch.ones(3),
        ),
        StepCounts(trained_tokens=3, trajectories=1),
        Ppo(),
    )
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()


def test_metrics_leave_out_tokens_without_weight():
    _, _, metrics = ppo_on([2.0, 7.0], [1.0, 0.0], weight=[1.0, 0.0])
    assert metrics["tokens"] == 1.0
    assert metrics["clip_fraction"] == 1.0


def loss_over(config, tokens):
    """(loss, gradient, metrics) of some of five tokens: three of one trajectory, two of another."""
    old = torch.tensor([-1.0, -2.0, -0.5, -1.5, -0.7], dtype=torch.float64)[tokens]
    logprobs = (old + torch.tensor([0.4, -0.7, -0.1, 1.3, 0.0], dtype=torch.float64)[tokens]).requires_grad_()
    signed = torch.tensor([2.0, -1.0, 1.0, -3.0, 0.5], dtype=torch.float64)[tokens]
    entropies = torch.tensor([0.1, 1.0, 2.0, 0.4, 1.5], dtype=torch.float64)[tokens]
    extra = {"sequence": torch.tensor([0, 0, 0, 1, 1])[tokens], "sequences": 2} if getattr(config, "sequence_level", False) else {}
    if getattr(config, "uses_old_entropies", False):
        extra["old_entropies"] = entropies
    loss, metrics = objective(
        Tokens(
            logprobs=logprobs,
            entropy=entropies,
            old_logprobs=old,
            ref_logprobs=old - 0.2,
            advantages=torch.stack([signed.clamp(min=0), (-signed).clamp(min=0)], dim=-1),
            weight=torch.ones_like(old),
            **extra,
        ),
        StepCounts(5, 2, EntropyStats(1.0, 0.7, threshold=1.0, lowest=0.1, highest=2.0), bounds=(0.8, 1.2)),
        config,
    )
    loss.backward()
    return loss.item(), logprobs.grad.tolist(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize("config", [entry.section() for entry in LOSSES.values()], ids=lambda config: config.name)
def test_every_loss_adds_up_over_micro_batches_and_does_not_care_for_the_order_of_tokens(config):
    """So that neither packing nor the layout can change a step. Whole trajectories, since gspo needs them together."""
    whole, gradient, metrics = loss_over(config, [0, 1, 2, 3, 4])
    first, second = loss_over(config, [0, 1, 2]), loss_over(config, [3, 4])
    assert whole == pytest.approx(first[0] + second[0])
    assert gradient == pytest.approx(first[1] + second[1])
    assert metrics == {name: pytest.approx(first[2][name] + second[2][name]) for name in metrics}
    shuffled = [3, 0, 4, 2, 1]
    again = loss_over(config, shuffled)
    assert again[0] == pytest.approx(whole) and again[1] == pytest.approx([gradient[token] for token in shuffled])
    assert any(gradient)


def test_losses_and_metrics_add_up_over_micro_batches():
    ratios, advantages = [1.5, 0.5, 0.9, 2.0], [2.0, -1.0, 1.0, -3.0]
    whole, whole_gradient, whole_metrics = ppo_on(ratios, advantages, tokens=4)
    first, first_gradient, first_metrics = ppo_on(ratios[:1], advantages[:1], tokens=4)
    second, second_gradient, second_metrics = ppo_on(ratios[1:], advantages[1:], tokens=4)
    assert whole == pytest.approx(first + second)
    assert whole_gradient.tolist() == pytest.approx([*first_gradient.tolist(), *second_gradient.tolist()])
    assert whole_metrics == {name: pytest.approx(first_metrics[name] + second_metrics[name]) for name in whole_metrics}


def test_a_micro_batch_without_tokens_adds_nothing():
    logprobs = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    tokens = Tokens(logprobs=logprobs, old_logprobs=empty, weight=empty, advantages=torch.zeros(0, 2))
    counts = StepCounts(trained_tokens=3, trajectories=1)
    for config in (PLAIN, Sft()):
        value, metrics = objective(tokens, counts, config)
        value.backward()
        assert value.item() == 0.0
        assert [metric.item() for metric in metrics.values()] == [0.0] * len(metrics)


def test_aggregations_weigh_a_long_and_a_short_trajectory_as_they_say():
    """Token losses 1 x 3 and 5 x 1: over all tokens 8 / 4, mean of means (1 + 5) / 2, mean of sums (3 + 5) / 2."""
    counts = StepCounts(trained_tokens=4, trajectories=2)
    trajectories = [[1.0, 1.0, 1.0], [5.0]]

    def aggregate(aggregation):
        total = sum(token_weight(aggregation, len(tokens)) * sum(tokens) for tokens in trajectories)
        return total / denominator(aggregation, counts)

    assert aggregate("token_mean") == pytest.approx(2.0)
    assert aggregate("sequence_mean") == pytest.approx(3.0)
    assert aggregate("sequence_sum") == pytest.approx(4.0)


def test_a_step_without_trained_tokens_has_no_denominator():
    with pytest.raises(AssertionError, match="skip it"):
        denominator("token_mean", StepCounts(trained_tokens=0, trajectories=0))


def test_sft_is_the_mean_negative_log_prob_of_trained_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True)
    loss, metrics = objective(
        Tokens(logprobs=logprobs, weight=torch.tensor([1.0, 1.0, 0.0])), StepCounts(trained_tokens=2, trajectories=1), Sft()
    )
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert logprobs.grad.tolist() == [-0.5, -0.5, 0.0]
    assert metrics["nll"].item() == pytest.approx(3.0)
    assert metrics["tokens"].item() == 2.0


def test_every_loss_is_in_the_table_of_the_documents_and_under_the_name_of_its_section():
    page = (Path(__file__).parents[2] / "docs/algorithms.md").read_text(encoding="utf-8")
    table = page.partition("## All algorithms")[2].partition("\nLeft out")[0]
    assert [name for name in LOSSES if f"| `{name}`" not in table and f"| `loss.name={name}`" not in table] == []
    assert [*LOSSES] == [entry.section().name for entry in LOSSES.values()]
    assert Sft().aggregation == "token_mean"
    assert Ppo(aggregation="sequence_sum").aggregation == "sequence_sum"


def test_gspo_clips_the_geometric_mean_of_a_trajectory_but_keeps_every_turn_its_advantage():
    """Ratios 2, 0.5 | 4, 1: geometric means 1 and 2, bounds 0.5 and 1.5. The first is inside: each token's gradient is -s A / 4, s = 1.
    The second is above: its token of A = 1 is clipped to -1.5, that of A = -1 is not, and counts 2."""
    config = Gspo(clip_low=0.5, clip_high=0.5, kl_coef=0.0, aggregation="token_mean")
    loss, gradient, metrics = ppo_on([2.0, 0.5, 4.0, 1.0], [1.0, 3.0, 1.0, -1.0], config, sequence=torch.tensor([0, 0, 1, 1]), sequences=2)
    assert loss == pytest.approx((-1 - 3 - 1.5 + 2) / 4)
    assert gradient.tolist() == pytest.approx([-0.25, -0.75, 0.0, 0.5])
    assert metrics["clip_fraction"] == 1.0


def test_gspo_of_one_advantage_has_the_gradient_of_the_papers_sequence_objective():
    """J = mean over trajectories of s_i A_i with s_i = exp(mean log-ratio), differentiated by torch."""
    logprobs, old = torch.tensor([-1.0, -2.0, -0.5, -1.5]), torch.tensor([-1.1, -1.9, -0.7, -1.4])
    reference = logprobs.clone().requires_grad_()
    ratio = reference - old
    (-(2.0 * ratio[:3].mean().exp() - 1.0 * ratio[3:].mean().exp()) / 2).backward()
    found = logprobs.clone().requires_grad_()
    share = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0])
    loss, _ = objective(
        Tokens(
            logprobs=found,
            old_logprobs=old,
            advantages=torch.stack([share * torch.tensor([2.0, 2.0, 2.0, 0.0]), share * torch.tensor([0.0, 0.0, 0.0, 1.0])], dim=-1),
            weight=share,
            sequence=torch.tensor([0, 0, 0, 1]),
            sequences=2,
        ),
        StepCounts(trained_tokens=4, trajectories=2),
        Gspo(clip_low=0.9, clip_high=9.0, kl_coef=0.0),
    )
    loss.backward()
    assert torch.allclose(found.grad, reference.grad)


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    """Ratios 4, 0.5, 1 with A = 1, 1, -2, upper bound 1.5: gradients -1.5, -0.5, +2 over 3 tokens; log-probs are -1 + ln ratio."""
    config = Cispo(clip_high=0.5, kl_coef=0.0)
    loss, gradient, metrics = ppo_on([4.0, 0.5, 1.0], [1.0, 1.0, -2.0], config)
    ln2 = 0.6931472
    assert gradient.tolist() == pytest.approx([-0.5, -0.5 / 3, 2 / 3])
    assert loss == pytest.approx((-1.5 * (2 * ln2 - 1) - 0.5 * (-ln2 - 1) + 2 * -1) / 3, rel=1e-5)
    assert metrics["clip_fraction"] == 1.0
    _, gradient, _ = ppo_on([0.5], [1.0], config.model_copy(update={"clip_low": 0.2}))
    assert gradient.tolist() == pytest.approx([-0.8])


def test_engine_mismatch_is_truncated_or_masked():
    """w = 4, 1, 1/8 | 2, 2; bounds 0.5 and 3. Geometric means (4 / 8)^(1/3) = 0.79 and 2; with high = 1.5 the second is out."""
    ratio, sequence = torch.tensor([4.0, 1.0, 0.125, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])

    def factor(mode, high=3.0):
        config = Ppo(mismatch=mode, mismatch_bounds=(0.5, high))
        return mismatch_factor(ratio.log(), torch.zeros(5), sequence, 2, config).tolist()

    assert factor("none") == [1.0] * 5
    assert factor("truncate") == pytest.approx([3.0, 1.0, 0.125, 2.0, 2.0])
    assert factor("mask") == pytest.approx([0.0, 1.0, 0.0, 2.0, 2.0])
    assert factor("mask_sequence") == [1.0] * 5
    assert factor("mask_sequence", high=1.5) == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_the_mean_of_a_trajectory_needs_no_order_of_its_tokens():
    assert sequence_mean(torch.tensor([1.0, 10.0, 3.0]), torch.tensor([2, 0, 2]), 3).tolist() == [2.0, 10.0, 2.0]
    assert sequence_mean(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0).tolist() == []


def bapo_bounds(share, **settings):
    """Bounds for a ratio 2 with A = 1 and a ratio 0.5 with A = -1, from 0.6 to 0.8 by 0.1 and from 1.2 to 3 by 0.3."""
    log_ratios = [torch.tensor([2.0]).log(), torch.tensor([0.5]).log()]
    advantages = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    steps = {"lower": (0.6, 0.8), "upper": (1.2, 3.0), "lower_step": 0.1, "upper_step": 0.3}
    return balanced_bounds(log_ratios, advantages, Bapo(**steps, positive_share=share, **settings))


def test_bapo_moves_its_upper_bound_until_the_positive_part_weighs_enough():
    """For a share of 1/2: 1.2 / (1.2 + 0.6) holds at once. For 0.7: 1.2 / 1.8 is too little, 1.5 / 2.1 is enough. For 0.99 nothing is:
    h at its end gives 2 / 2.6, then l goes to its own."""
    assert bapo_bounds(0.5) == pytest.approx((0.6, 1.2))
    assert bapo_bounds(0.7) == pytest.approx((0.6, 1.5))
    assert bapo_bounds(0.99) == pytest.approx((0.8, 3.0))


def test_bapo_can_move_its_lower_bound_first_as_the_published_code_does():
    """For 0.7: 1.2 / 1.8 is too little; l goes to its end, 0.8, then h: 1.5 / 2.3, 1.8 / 2.6 = 0.692, and 2 / 2.8 at h = 2.1."""
    assert bapo_bounds(0.5, first="lower") == pytest.approx((0.6, 1.2))
    assert bapo_bounds(0.7, first="lower") == pytest.approx((0.8, 2.1))


E = 2.718281828
HAPO = {"kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.3}
STATS = EntropyStats(0.0, 1.0, threshold=1.0, lowest=1 / E, highest=E)
"""ln of least, threshold and most: -1, 0, 1, so h is the logarithm of a token's entropy."""


def test_hapo_places_entropies_between_least_threshold_and_most():
    entropies = torch.tensor([1 / E, E**-0.5, 1.0, E**0.5, E, 99.0, 0.0])
    assert entropy_position(entropies, STATS).tolist() == pytest.approx([-1.0, -0.5, 0.0, 0.5, 1.0, 1.0, -1.0], abs=1e-5)
    equal = EntropyStats(1.0, 1.0, threshold=1.0, lowest=1.0, highest=1.0)
    assert entropy_position(torch.ones(2), equal).tolist() == [0.0, 0.0]


def hapo_on(ratios, advantages, entropies, **settings):
    counts = StepCounts(len(ratios), 1, STATS)
    return ppo_on(ratios, advantages, Hapo(**HAPO, **settings), old_entropies=torch.tensor(entropies), counts=counts)


def test_hapo_widens_the_upper_bound_where_the_policy_was_unsure_and_the_lower_one_where_it_was_sure():
    """h = 1: bounds 0.8 and 1.6; r 1.5 is inside, and outside of the neutral 0.9 to 1.3, so A = 1 counts twice. h = 0: bounds 0.8 and 1.3,
    r 1.5 is clipped. h = -1: bounds 0.6 and 1.3; r 0.7 with A = -1 keeps its gradient (0.7 is not neutral: no scale); with h = 1 it is
    clipped at 0.8, where A counts twice."""
    loss, gradient, metrics = hapo_on([1.5, 1.5, 0.7, 0.7], [1.0, 1.0, -1.0, -1.0], [E, 1.0, 1 / E, E])
    assert gradient.tolist() == pytest.approx([-2 * 1.5 / 4, 0.0, 0.7 / 4, 0.0], rel=1e-5)
    assert loss == pytest.approx((-2 * 1.5 - 1.3 + 0.7 + 2 * 0.8) / 4, rel=1e-5)
    assert metrics["clip_fraction"] == 2.0


def test_hapo_scales_advantages_only_where_the_update_has_a_direction():
    """r = 1 is neutral: h = 1 changes nothing, h = -1/2 halves A; r = 1.2 is neutral for h = 1 (up to 1.3) and not for h = -1/2 (1.15)."""
    _, gradient, _ = hapo_on([1.0, 1.0, 1.2, 1.2], [1.0] * 4, [E, E**-0.5, E, E**-0.5])
    assert gradient.tolist() == pytest.approx([-1 / 4, -0.5 / 4, -1.2 / 4, -1.2 / 4], rel=1e-5)


def test_hapo_without_weights_is_ppo():
    case = ([1.5, 0.5, 0.5, 1.5, 4.0], [2.0, 2.0, -2.0, -2.0, -2.0])
    found = hapo_on(*case, [E, 1.0, 1 / E, E, E], clip_weight=0.0, advantage_weight=0.0)
    expected = ppo_on(*case, Ppo(**HAPO, aggregation="token_mean"))
    assert found[0] == pytest.approx(expected[0]) and found[1].tolist() == pytest.approx(expected[1].tolist())
    assert hapo_on(*case, [E, 1.0, 1 / E, E, E])[0] != pytest.approx(expected[0])
