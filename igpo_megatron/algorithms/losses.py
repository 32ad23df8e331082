"""Losses: per-token tensors in, sums out. The only file of this package that needs torch.

Shapes: N scored tokens of a micro-batch. A token that several trajectories share (a tree) appears once; what it means to each of them is
summed into `weight` [N] and `advantages` [N, 2] beforehand:

    weight     = sum over the trajectories through the token of w,  w = `token_weight(aggregation, trained tokens of the trajectory)`
    advantages = (sum of w * max(A, 0),  sum of w * max(-A, 0)),    A = that trajectory's advantage for the turn

A token with weight 0 is not trained. The returned scalar is divided by a global count, so it adds up over micro-batches and ranks to the
loss of the whole step. Metrics are sums over trained tokens with their count in `tokens`; they add up the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from igpo_megatron.config.schema import Aepo, Ppo, Sft
from igpo_megatron.config.schema import Loss as LossConfig
from igpo_megatron.types import StepCounts

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]

LossResult = tuple[Tensor, dict[str, Tensor]]
"""(scalar with gradient, metric name -> detached sum over trained tokens)."""

Loss = Callable[..., LossResult]
"""Called with the keyword arguments of `ppo`; bind `config` with functools.partial."""

_MAX_LOG_RATIO = 20.0
_MAX_KL = 10.0


def aggregation_of(config: LossConfig) -> Aggregation:
    """How a loss averages over tokens; supervised training is a mean over tokens."""
    return config.aggregation if isinstance(config, Ppo) else "token_mean"


def token_weight(aggregation: Aggregation, num_tokens: int) -> float:
    """Weight of each token of a trajectory that has `num_tokens` trained tokens."""
    return 1.0 / num_tokens if aggregation == "sequence_mean" else 1.0


def denominator(aggregation: Aggregation, counts: StepCounts) -> float:
    """What the weighted sum over all tokens of the step is divided by."""
    count = counts.trained_tokens if aggregation == "token_mean" else counts.trajectories
    assert count > 0, "a step without trained tokens has no loss; skip it"
    return float(count)


def ppo(
    *,
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weight: Tensor,
    counts: StepCounts,
    config: Ppo,
) -> LossResult:
    """Clipped policy gradient (arXiv 1707.06347) with dual clip (arXiv 1912.09729), KL to a reference and entropy bonus.

    logprobs [N] fp32 with gradient; entropy, old_logprobs, ref_logprobs, weight [N] fp32; advantages [N, 2] fp32 (module docstring).
    entropy and ref_logprobs may be None where their coefficient is 0.

    For one trajectory with advantage A, ratio r and bounds l = 1 - clip_low, h = 1 + clip_high, the token's loss is

        A > 0:  max(-A r, -A clip(r, l, h))                  = -A min(r, h)
        A < 0:  min(max(-A r, -A clip(r, l, h)), -A dual)    = |A| min(max(r, l), dual)        since dual > 1 >= l

    Both are linear in |A|, so trajectories that share the token need only the sums of their positive and of their negative parts.

    The KL term is k3 = exp(d) - d - 1 with d = ref - logprob, clamped to at most 10 as published: beyond that it has no gradient.
    """
    return _clipped(logprobs, entropy, old_logprobs, ref_logprobs, advantages, weight, counts, config, balanced=None)


def aepo(
    *,
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weight: Tensor,
    counts: StepCounts,
    config: Aepo,
    old_entropies: Tensor | None = None,
) -> LossResult:
    """AEPO (arXiv 2510.14545): `ppo` with a clip that keeps its gradient and advantages that look at entropy. Takes what `ppo` takes.

    The loss has PPO's value, and where PPO's gradient of -A r is r grad logprob, here it is

        A > 0, r > 1 + clip_high:   (1 + clip_high) grad logprob        (PPO: 0)
        elsewhere                   as in PPO

    The code writes the clipped ratio as (1 + clip_high) / sg(r) * r, which is inf x 0 where r underflows; here it is
    (1 + clip_high) exp(logprob - sg(logprob)). A becomes A (1 + a z), z = (H - mean H) / std H, H [N] the token's entropy; where the
    factor is negative, positive and negative parts change places.
    """
    positive, negative = advantages.unbind(-1)
    if config.entropy_advantage != "none":
        factor = 1.0 + config.entropy_advantage_weight * _entropy_scores(config, entropy, old_entropies, weight, counts)
        up, down = factor.clamp(min=0.0), (-factor).clamp(min=0.0)
        positive, negative = positive * up + negative * down, negative * up + positive * down
    if config.balanced_tokens == "all":
        balanced = torch.ones_like(weight, dtype=torch.bool)
    else:
        assert old_entropies is not None and counts.entropy is not None, "loss.balanced_tokens=high_entropy needs old entropies"
        balanced = old_entropies > counts.entropy.threshold
    scaled = torch.stack((positive, negative), -1)
    return _clipped(logprobs, entropy, old_logprobs, ref_logprobs, scaled, weight, counts, config, balanced=balanced)


def _entropy_scores(config: Aepo, entropy: Tensor | None, old_entropies: Tensor | None, weight: Tensor, counts: StepCounts) -> Tensor:
    """[N] z-score of every token's entropy, without gradient."""
    if config.entropy_advantage == "corrected":
        assert old_entropies is not None and counts.entropy is not None, "loss.entropy_advantage=corrected needs old entropies"
        return (old_entropies - counts.entropy.mean) / counts.entropy.std
    assert entropy is not None, "loss.entropy_advantage needs the entropy of every token"
    current = entropy.detach()
    trained = current[weight > 0]
    std = trained.std() if len(trained) > 1 else current.new_ones(())
    return (current - trained.mean()) / torch.where(std > 0, std, 1.0) if len(trained) else torch.zeros_like(current)


def _clipped(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weight: Tensor,
    counts: StepCounts,
    config: Ppo,
    balanced: Tensor | None,
) -> LossResult:
    """The common body of `ppo` and `aepo`; `balanced` [N] bool marks tokens that keep a gradient above the upper clip."""
    assert old_logprobs is not None, "ppo needs the log-probs from before the step"
    log_ratio = logprobs - old_logprobs
    # Bounded before exp: an infinite ratio would be clipped to a finite loss but leave a nan gradient (0 * inf).
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    positive, negative = advantages.unbind(-1)
    lower, upper = 1.0 - config.clip_low, 1.0 + config.clip_high
    below = ratio.clamp(max=upper)
    if balanced is not None:
        below = torch.where(balanced & (ratio > upper), upper * (logprobs - logprobs.detach()).exp(), below)
    total = (negative * ratio.clamp(min=lower, max=config.dual_clip) - positive * below).sum()

    fixed_ratio = ratio.detach()
    dual_clipped = (negative > 0) & (fixed_ratio > config.dual_clip) if config.dual_clip else torch.zeros_like(negative, dtype=torch.bool)
    clipped = ((positive > 0) & (fixed_ratio > upper)) | ((negative > 0) & (fixed_ratio < lower)) | dual_clipped
    per_token = {
        "clipped": clipped.to(ratio.dtype),
        "dual_clipped": dual_clipped.to(ratio.dtype),
        "ratio": fixed_ratio,
        "approx_kl": k3(log_ratio.detach()),
    }
    if entropy is not None:
        per_token["entropy"] = entropy.detach()
        if config.entropy_coef:
            total = total - config.entropy_coef * (weight * entropy).sum()
    else:
        assert not config.entropy_coef, "loss.entropy_coef needs the entropy of every token"
    if ref_logprobs is not None:
        reference_kl = k3(ref_logprobs - logprobs)
        per_token["ref_kl"] = reference_kl.detach()
        if config.kl_coef:
            total = total + config.kl_coef * (weight * reference_kl).sum()
    else:
        assert not config.kl_coef, "loss.kl_coef needs the reference log-probs of every token"
    return total / denominator(config.aggregation, counts), _sums_over_trained(per_token, weight)


def sft(
    *,
    logprobs: Tensor,
    entropy: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    weight: Tensor,
    counts: StepCounts,
    config: Sft,
) -> LossResult:
    """Cross-entropy: -sum(weight * logprobs) / trained tokens. Takes what `ppo` takes and uses logprobs, weight [N] fp32 and counts."""
    loss = -(weight * logprobs).sum() / denominator(aggregation_of(config), counts)
    per_token = {"nll": -logprobs.detach()}
    if entropy is not None:
        per_token["entropy"] = entropy.detach()
    return loss, _sums_over_trained(per_token, weight)


LOSSES: dict[str, Loss] = {"ppo": ppo, "aepo": aepo, "sft": sft}


def k3(log_ratio: Tensor) -> Tensor:
    """KL estimate exp(d) - d - 1 of samples from q, d = log p - log q, for KL(q || p); clamped to at most 10 as published. [N] -> [N]"""
    # At |d| = 20 the estimate is past its own clamp, so this bound changes nothing but keeps exp and its gradient finite.
    bounded = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (bounded.exp() - bounded - 1.0).clamp(max=_MAX_KL)


def _sums_over_trained(per_token: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    trained = weight > 0
    return {"tokens": trained.sum().to(weight.dtype), **{name: values[trained].sum() for name, values in per_token.items()}}
