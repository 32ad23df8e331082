"""The clipped loss by hand, and on tokens that several trajectories share."""

from __future__ import annotations

import math

import pytest
import torch

from igpo_megatron.algorithms.losses import denominator, ppo, sft, token_weight
from igpo_megatron.config.schema import Ppo, Sft
from igpo_megatron.types import StepCounts

COUNTS = StepCounts(trained_tokens=10, trajectories=4, groups=2)


def one_token(ratio: float, advantage: float, **settings: float | None) -> tuple[float, float]:
    """(loss x trained tokens, its derivative by the log-prob) of a single token."""
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = ppo(
        logprobs=logprob,
        entropy=None,
        old_logprobs=torch.zeros(1),
        ref_logprobs=None,
        advantages=torch.tensor([[max(advantage, 0.0), max(-advantage, 0.0)]]),
        weight=torch.ones(1),
        counts=COUNTS,
        config=Ppo(kl_coef=0.0, aggregation="token_mean", **settings),  # type: ignore[arg-type]
    )
    loss.backward()
    return float(loss.detach()) * 10, float(logprob.grad) * 10


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: -A r
        (1.5, 2.0, -2.6, 0.0),  # above 1 + 0.3: clipped
        (0.5, 2.0, -1.0, -1.0),  # below, but the advantage is positive: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below 1 - 0.2 with a negative advantage: clipped
        (1.5, -2.0, 3.0, 3.0),  # above with a negative advantage: not clipped
        (5.0, -2.0, 6.0, 0.0),  # dual clip at 3
    ],
)
def test_each_side_of_the_clipped_loss(ratio: float, advantage: float, loss: float, slope: float) -> None:
    found = one_token(ratio, advantage, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert found == (pytest.approx(loss, abs=1e-5), pytest.approx(slope, abs=1e-5))


def test_without_the_dual_clip_a_large_ratio_counts_in_full() -> None:
    assert one_token(5.0, -2.0, dual_clip=None)[0] == pytest.approx(10.0, abs=1e-4)


def shared(combine_wrongly: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(|loss difference|, largest gradient difference) between shared tokens with summed parts and one loss per trajectory."""
    generator = torch.Generator().manual_seed(0)
    config = Ppo(kl_coef=0.1, entropy_coef=0.05, clip_low=0.1, clip_high=0.3, aggregation="sequence_mean")
    tokens, trajectories = 50, 3
    old = torch.randn(tokens, generator=generator)
    logprobs = (old + torch.randn(tokens, generator=generator)).requires_grad_()
    reference, entropy = torch.randn(tokens, generator=generator), torch.rand(tokens, generator=generator)
    advantages, weights = torch.randn(trajectories, generator=generator), torch.rand(trajectories, generator=generator)
    parts = torch.stack(((weights * advantages).clamp(min=0).sum(), (-weights * advantages).clamp(min=0).sum()))
    if combine_wrongly:
        total = (weights * advantages).sum()
        parts = torch.stack((total.clamp(min=0), (-total).clamp(min=0)))

    def loss(pair: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ppo(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=old,
            ref_logprobs=reference,
            advantages=pair.expand(tokens, 2),
            weight=weight.expand(tokens),
            counts=COUNTS,
            config=config,
        )[0]

    together = loss(parts, weights.sum())
    products = (weights * advantages).tolist()
    apart = sum((loss(torch.tensor([max(p, 0.0), max(-p, 0.0)]), w) for p, w in zip(products, weights, strict=True)), start=torch.zeros(()))
    grads = [torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (together, apart)]
    return (together - apart).abs().detach(), (grads[0] - grads[1]).abs().max()


def test_summed_parts_are_exact_on_shared_tokens() -> None:
    value, gradient = shared()
    assert float(value) < 1e-5 and float(gradient) < 1e-5


def test_summing_advantages_with_their_signs_would_be_wrong() -> None:
    value, gradient = shared(combine_wrongly=True)
    assert float(value) > 1e-3 and float(gradient) > 1e-3


def test_the_kl_term_is_k3_with_its_gradient() -> None:
    """d = ref - logprob = 1: exp(1) - 1 - 1; derivative by the log-prob: 1 - exp(1)."""
    logprob = torch.tensor([-2.0], requires_grad=True)
    loss, metrics = ppo(
        logprobs=logprob,
        entropy=None,
        old_logprobs=torch.tensor([-2.0]),
        ref_logprobs=torch.tensor([-1.0]),
        advantages=torch.zeros(1, 2),
        weight=torch.ones(1),
        counts=COUNTS,
        config=Ppo(kl_coef=0.5, aggregation="token_mean"),
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.05 * (math.e - 2), rel=1e-5)
    assert float(logprob.grad) == pytest.approx(0.05 * (1 - math.e), rel=1e-5)
    assert float(metrics["ref_kl"]) == pytest.approx(math.e - 2, rel=1e-5)


def test_extreme_ratios_leave_finite_gradients() -> None:
    logprobs = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = ppo(
        logprobs=logprobs,
        entropy=None,
        old_logprobs=torch.zeros(2),
        ref_logprobs=None,
        advantages=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        weight=torch.ones(2),
        counts=COUNTS,
        config=Ppo(kl_coef=0.0, dual_clip=None),
    )
    loss.backward()
    assert math.isfinite(float(loss.detach())) and torch.isfinite(logprobs.grad).all()


def test_supervised_loss_is_the_mean_over_all_trained_tokens() -> None:
    loss, metrics = sft(logprobs=torch.tensor([-1.0, -3.0]), weight=torch.ones(2), counts=COUNTS, config=Sft())
    assert float(loss) == pytest.approx(0.4) and float(metrics["nll"]) == pytest.approx(4.0)


def test_aggregations_differ_in_token_weight_and_denominator() -> None:
    assert [token_weight(name, 5) for name in ("token_mean", "sequence_mean", "sequence_sum")] == [1.0, 0.2, 1.0]
    assert [denominator(name, COUNTS) for name in ("token_mean", "sequence_mean", "sequence_sum")] == [10.0, 4.0, 4.0]
