"""Losses: per-token tensors in, sums out. The only file of this package that needs torch.

Shapes: N scored tokens of a micro-batch. A token that several trajectories share (a tree) appears once; what it means to each of them is
summed into `weight` [N] and `advantages` [N, 2] beforehand:

    weight     = sum over the trajectories through the token of w,  w = `token_weight(aggregation, trained tokens of the trajectory)`
    advantages = (sum of w * max(A, 0),  sum of w * max(-A, 0)),    A = that trajectory's advantage for the turn

A token with weight 0 is not trained. The returned scalar is divided by a global count, so it adds up over micro-batches and ranks to the
loss of the whole step. Metrics are sums over trained tokens with their count in `tokens`; they add up the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from igpo_megatron.algorithms.settings import Aepo, Aggregation, Bapo, Cispo, Gspo, Hapo, PolicyLoss, Ppo, Sft
from igpo_megatron.algorithms.settings import Loss as LossConfig
from igpo_megatron.types import EntropyStats, StepCounts

LossResult = tuple[Tensor, dict[str, Tensor]]
"""(scalar with gradient, metric name -> detached sum over trained tokens)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The N scored tokens of a micro-batch. What is None is not known; a loss that needs it says so."""

    logprobs: Tensor
    """[N] fp32, with gradient."""

    weight: Tensor
    """[N] fp32 (module docstring)."""

    advantages: Tensor | None = None
    """[N, 2] fp32 (module docstring)."""

    old_logprobs: Tensor | None = None
    """[N] fp32, from before the step."""

    ref_logprobs: Tensor | None = None
    """[N] fp32, of the reference policy."""

    entropy: Tensor | None = None
    """[N] fp32, nats, with gradient."""

    old_entropies: Tensor | None = None
    """[N] fp32, nats, from before the step."""

    sequence: Tensor | None = None
    """[N] int64, the trajectory of every token, for losses on whole trajectories."""

    sequences: int = 0
    """Number of trajectories, more than the greatest of `sequence`; a number, so that no device has to be asked for it."""

    @property
    def log_ratio(self) -> Tensor:
        """[N] log of the probability now over that before the step."""
        assert self.old_logprobs is not None, "this loss needs the log-probs from before the step"
        return self.logprobs - self.old_logprobs

    @property
    def signed(self) -> Tensor:
        """[N, 2] advantages, which every policy gradient needs."""
        assert self.advantages is not None, "this loss needs advantages"
        return self.advantages


class Loss(Protocol):
    """One loss; `config` is its section of the configuration."""

    def __call__(self, tokens: Tokens, counts: StepCounts, config: Any) -> LossResult: ...


_MAX_LOG_RATIO = 20.0
_MAX_KL = 10.0
_LEAST_ENTROPY = 1e-8


def aggregation_of(config: LossConfig) -> Aggregation:
    """How a loss averages over tokens; supervised training is a mean over tokens."""
    return config.aggregation


def token_weight(aggregation: Aggregation, num_tokens: int) -> float:
    """Weight of each token of a trajectory that has `num_tokens` trained tokens."""
    return 1.0 / num_tokens if aggregation == "sequence_mean" else 1.0


def denominator(aggregation: Aggregation, counts: StepCounts) -> float:
    """What the weighted sum over all tokens of the step is divided by."""
    count = counts.trained_tokens if aggregation == "token_mean" else counts.trajectories
    assert count > 0, "a step without trained tokens has no loss; skip it"
    return float(count)


def ppo(tokens: Tokens, counts: StepCounts, config: Ppo) -> LossResult:
    """Clipped policy gradient (arXiv 1707.06347) with dual clip (arXiv 1912.09729), KL to a reference and entropy bonus.

    Entropy and ref_logprobs may be None where their coefficient is 0.

    For one trajectory with advantage A, ratio r and bounds l = 1 - clip_low, h = 1 + clip_high, the token's loss is

        A > 0:  max(-A r, -A clip(r, l, h))                  = -A min(r, h)
        A < 0:  min(max(-A r, -A clip(r, l, h)), -A dual)    = |A| min(max(r, l), dual)        since dual > 1 >= l

    Both are linear in |A|, so trajectories that share the token need only the sums of their positive and of their negative parts.

    The KL term is k3 = exp(d) - d - 1 with d = ref - logprob, clamped to at most 10 as published: beyond that it has no gradient.
    """
    log_ratio = tokens.log_ratio
    surrogate, clipped = _clipped_surrogate(_bounded_exp(log_ratio), tokens.signed, config.clip_low, config.clip_high, config.dual_clip)
    per_token = {**clipped, "approx_kl": k3(log_ratio.detach())}
    return _with_regularisers(surrogate, per_token, tokens, counts, config)


def aepo(tokens: Tokens, counts: StepCounts, config: Aepo) -> LossResult:
    """AEPO (arXiv 2510.14545): `ppo` with a clip that keeps its gradient and advantages that look at entropy.

    The loss has PPO's value, and where PPO's gradient of -A r is r grad logprob, here it is

        A > 0, r > 1 + clip_high:   (1 + clip_high) grad logprob        (PPO: 0)
        elsewhere                   as in PPO

    The code writes the clipped ratio as (1 + clip_high) / sg(r) * r, which is inf x 0 where r underflows; here it is
    (1 + clip_high) exp(logprob - sg(logprob)). A becomes A (1 + a z), z = (H - mean H) / std H, H [N] the token's entropy; where the
    factor is negative, positive and negative parts change places.
    """
    positive, negative = tokens.signed.unbind(-1)
    if config.entropy_advantage != "none":
        factor = 1.0 + config.entropy_advantage_weight * _entropy_scores(tokens, counts, config)
        up, down = factor.clamp(min=0.0), (-factor).clamp(min=0.0)
        positive, negative = positive * up + negative * down, negative * up + positive * down
    if config.balanced_tokens == "all":
        balanced = torch.ones_like(tokens.weight, dtype=torch.bool)
    else:
        assert tokens.old_entropies is not None and counts.entropy is not None, "loss.balanced_tokens=high_entropy needs old entropies"
        balanced = tokens.old_entropies > counts.entropy.threshold
    scaled = torch.stack((positive, negative), -1)
    log_ratio = tokens.log_ratio
    ratio, upper = _bounded_exp(log_ratio), 1.0 + config.clip_high
    capped = torch.where(balanced & (ratio > upper), upper * _unit(tokens.logprobs), ratio.clamp(max=upper))
    surrogate, clipped = _clipped_surrogate(ratio, scaled, config.clip_low, config.clip_high, config.dual_clip, capped)
    per_token = {**clipped, "approx_kl": k3(log_ratio.detach())}
    return _with_regularisers(surrogate, per_token, tokens, counts, config)


def _entropy_scores(tokens: Tokens, counts: StepCounts, config: Aepo) -> Tensor:
    """[N] z-score of every token's entropy, without gradient."""
    if config.entropy_advantage == "corrected":
        assert tokens.old_entropies is not None and counts.entropy is not None, "loss.entropy_advantage=corrected needs old entropies"
        return (tokens.old_entropies - counts.entropy.mean) / counts.entropy.std
    assert tokens.entropy is not None, "loss.entropy_advantage needs the entropy of every token"
    current = tokens.entropy.detach()
    trained = tokens.weight > 0
    count = trained.sum()
    mean = torch.where(trained, current, 0.0).sum() / count.clamp(min=1)
    std = (torch.where(trained, current - mean, 0.0).square().sum() / (count - 1).clamp(min=1)).sqrt()
    return (current - mean) / torch.where(std > 0, std, 1.0)


def hapo(tokens: Tokens, counts: StepCounts, config: Hapo) -> LossResult:
    """HAPO (arXiv 2509.16591, eq. 10 to 13): `ppo` with bounds and advantages that follow h, `entropy_position`.

        h <= 0:  clip_low becomes clip_low (1 - h);    A becomes A (1 + h) where r is within [1 - clip_low / 2, 1 + clip_high / 2]
        h > 0:   clip_high becomes clip_high (1 + h);  A becomes A (1 + h) where r is outside of it

    h is of entropies before the step, over all its tokens, so that packing cannot change the gradient (the code takes those of the
    current policy over a micro-batch). `clip_weight` and `advantage_weight` multiply h; 1 in the paper.
    """
    assert tokens.old_entropies is not None and counts.entropy is not None, "hapo needs old entropies"
    position = entropy_position(tokens.old_entropies, counts.entropy)
    clip_low = config.clip_low * (1.0 - config.clip_weight * position.clamp(max=0.0))
    clip_high = config.clip_high * (1.0 + config.clip_weight * position.clamp(min=0.0))
    log_ratio = tokens.log_ratio
    ratio = _bounded_exp(log_ratio)
    neutral = (ratio > 1.0 - clip_low / 2) & (ratio < 1.0 + clip_high / 2)
    scaled = torch.where((position > 0) ^ neutral, 1.0 + config.advantage_weight * position, 1.0)
    surrogate, clipped = _clipped_surrogate(ratio, tokens.signed * scaled[:, None], clip_low, clip_high, config.dual_clip)
    per_token = {**clipped, "approx_kl": k3(log_ratio.detach())}
    return _with_regularisers(surrogate, per_token, tokens, counts, config)


def entropy_position(entropies: Tensor, stats: EntropyStats) -> Tensor:
    """h in [-1, 1] (HAPO, arXiv 2509.16591, eq. 5 and 6): where ln H lies between the step's least (-1), its threshold (0) and most (1).

    The deviation that eq. 5 divides by cancels in eq. 6. The published code divides by the negative least, which makes h of low
    entropies positive, too. [N] -> [N]
    """
    lowest, middle, highest = (math.log(max(value, _LEAST_ENTROPY)) for value in (stats.lowest, stats.threshold, stats.highest))
    rise = entropies.clamp(min=_LEAST_ENTROPY).log() - middle
    return torch.where(rise > 0, rise / max(highest - middle, _LEAST_ENTROPY), rise / max(middle - lowest, _LEAST_ENTROPY)).clamp(-1.0, 1.0)


def gspo(tokens: Tokens, counts: StepCounts, config: Gspo) -> LossResult:
    """GSPO-token (arXiv 2507.18071, eq. 13 and 14): PPO's clip with one ratio per trajectory.

    With sg[] for "no gradient" and y the trajectory's tokens:

        s   = exp(1/|y| sum_t (logprob_t - old_logprob_t)),        s_t = sg[s] * exp(logprob_t - sg[logprob_t])
        token's loss = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

    With one advantage per trajectory and `sequence_mean` value and gradient are those of GSPO. A token has one ratio only, so
    trajectories must not share tokens.
    """
    assert tokens.sequence is not None, "gspo needs the trajectory of every token"
    log_ratio = tokens.log_ratio
    ratio = _bounded_exp(sequence_mean(log_ratio.detach(), tokens.sequence, tokens.sequences)) * _unit(tokens.logprobs)
    surrogate, clipped = _clipped_surrogate(ratio, tokens.signed, config.clip_low, config.clip_high, None)
    per_token = {**clipped, "approx_kl": k3(log_ratio.detach())}
    return _with_regularisers(surrogate, per_token, tokens, counts, config)


def cispo(tokens: Tokens, counts: StepCounts, config: Cispo) -> LossResult:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): a token's loss is -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob."""
    log_ratio = tokens.log_ratio.detach()
    ratio = _bounded_exp(log_ratio)
    counted = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    positive, negative = tokens.signed.unbind(-1)
    surrogate = ((negative - positive) * counted * tokens.logprobs).sum()
    per_token = {"clipped": (counted != ratio).to(ratio.dtype), "ratio": ratio, "approx_kl": k3(log_ratio)}
    return _with_regularisers(surrogate, per_token, tokens, counts, config)


def sft(tokens: Tokens, counts: StepCounts, config: Sft) -> LossResult:
    """Cross-entropy: -sum(weight * logprobs) / trained tokens."""
    loss = -(tokens.weight * tokens.logprobs).sum() / denominator(aggregation_of(config), counts)
    per_token = {"nll": -tokens.logprobs.detach()}
    if tokens.entropy is not None:
        per_token["entropy"] = tokens.entropy.detach()
    return loss, _sums_over_trained(per_token, tokens.weight)


LOSSES: dict[str, Loss] = {"ppo": ppo, "bapo": ppo, "aepo": aepo, "hapo": hapo, "gspo": gspo, "cispo": cispo, "sft": sft}
"""bapo is ppo with the bounds that `balanced_clip` finds before the step."""


def balanced_clip(log_ratios: Sequence[Tensor], advantages: Sequence[Tensor], config: Bapo) -> Ppo:
    """BAPO (arXiv 2510.18927) for all rows of an optimizer step: log_ratios [N], advantages [N, 2] per row -> PPO with its bounds.

    With r the ratios, bounds l and h, and A+ and A- the two parts of the advantages, the share of the positive part is

        share = P / (P + M),    P = sum A+ min(r, h),    M = sum A- max(r, l)

    While it is below `positive_share`, h goes up to its end, then l, in steps (algorithm 1; the published code moves l first). As in the
    code, M counts the tokens that l clips, so a higher l takes gradient from negative tokens but never raises the share; and tokens are
    not weighted by the probability with which they were sampled, as the paper's sum is.
    """
    ratio = _bounded_exp(torch.cat(list(log_ratios)))
    positive, negative = torch.cat(list(advantages)).unbind(-1)
    bound = {"upper": config.upper[0], "lower": config.lower[0]}
    step = {"upper": config.upper_step, "lower": config.lower_step}
    end = {"upper": config.upper[1], "lower": config.lower[1]}

    def is_balanced() -> bool:
        gained = float((positive * ratio.clamp(max=bound["upper"])).sum())
        lost = float((negative * ratio.clamp(min=bound["lower"])).sum())
        return gained >= config.positive_share * (gained + lost)

    for name in ("upper", "lower") if config.first == "upper" else ("lower", "upper"):
        while not is_balanced() and bound[name] < end[name]:
            bound[name] = min(bound[name] + step[name], end[name])
    shared = {name: getattr(config, name) for name in PolicyLoss.model_fields if name != "name"}
    return Ppo(**shared, clip_low=1.0 - bound["lower"], clip_high=bound["upper"] - 1.0, dual_clip=config.dual_clip)


def mismatch_factor(old_logprobs: Tensor, behavior_logprobs: Tensor, sequence: Tensor, sequences: int, config: PolicyLoss) -> Tensor:
    """What each token's advantages are multiplied by because the engine that sampled it is not quite the trainer. [N] -> [N]

    `sequence` and `sequences` as in `Tokens`.

    With w = exp(old_logprob - behavior_logprob), both from before the step, and bounds [low, high]:

        truncate       min(w, high)                        truncated importance sampling (TIS; Yao et al. 2025, "Your Efficient RL
                                                           Framework Secretly Brings You Off-Policy RL Training"), high = 2
        mask           w if low <= w <= high, else 0       IcePop (arXiv 2510.18855), 0.5 and 5
        mask_sequence  1 if low <= m <= high, else 0       m the geometric mean of w over the trajectory (Liu, Li et al. 2025, "When Speed
                                                           Kills Stability")

    Masked tokens still count in the loss's denominator, which is fixed before the step.
    """
    low, high = config.mismatch_bounds
    log_ratio = old_logprobs - behavior_logprobs
    match config.mismatch:
        case "truncate":
            return _bounded_exp(log_ratio).clamp(max=high)
        case "mask":
            ratio = _bounded_exp(log_ratio)
            return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
        case "mask_sequence":
            mean = _bounded_exp(sequence_mean(log_ratio, sequence, sequences))
            return ((mean >= low) & (mean <= high)).to(log_ratio.dtype)
    return torch.ones_like(log_ratio)


def sequence_mean(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Every token's mean over the tokens of its own trajectory, of `sequences`. [N], [N] -> [N]"""
    sums, tokens = values.new_zeros(sequences), values.new_zeros(sequences)
    sums.index_add_(0, sequence, values)
    tokens.index_add_(0, sequence, torch.ones_like(values))
    return (sums / tokens)[sequence]


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    # Bounded before exp: an infinite ratio would be clipped to a finite loss but leave a nan gradient (0 * inf).
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def _unit(logprobs: Tensor) -> Tensor:
    """[N] ones whose gradient is that of the log-probs."""
    return (logprobs - logprobs.detach()).exp()


def _clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None,
    capped: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of the loss derived in `ppo`, and per token what was clipped. Bounds may be [N]; `capped` [N] replaces min(r, h)."""
    positive, negative = advantages.unbind(-1)
    lower, upper = 1.0 - clip_low, 1.0 + clip_high
    floored = torch.clamp(ratio, min=lower)
    floored = floored.clamp(max=dual_clip) if dual_clip else floored
    total = (negative * floored - positive * (torch.clamp(ratio, max=upper) if capped is None else capped)).sum()
    fixed_ratio = ratio.detach()
    dual_clipped = (negative > 0) & (fixed_ratio > dual_clip) if dual_clip else torch.zeros_like(negative, dtype=torch.bool)
    clipped = ((positive > 0) & (fixed_ratio > upper)) | ((negative > 0) & (fixed_ratio < lower)) | dual_clipped
    return total, {"clipped": clipped.to(ratio.dtype), "dual_clipped": dual_clipped.to(ratio.dtype), "ratio": fixed_ratio}


def _with_regularisers(total: Tensor, per_token: dict[str, Tensor], tokens: Tokens, counts: StepCounts, config: PolicyLoss) -> LossResult:
    """Add entropy bonus and KL term to a surrogate, divide by the step's count and sum the metrics."""
    if tokens.entropy is not None:
        per_token["entropy"] = tokens.entropy.detach()
        if config.entropy_coef:
            total = total - config.entropy_coef * (tokens.weight * tokens.entropy).sum()
    else:
        assert not config.entropy_coef, "loss.entropy_coef needs the entropy of every token"
    if tokens.ref_logprobs is not None:
        reference_kl = k3(tokens.ref_logprobs - tokens.logprobs)
        per_token["ref_kl"] = reference_kl.detach()
        if config.kl_coef:
            total = total + config.kl_coef * (tokens.weight * reference_kl).sum()
    else:
        assert not config.kl_coef, "loss.kl_coef needs the reference log-probs of every token"
    return total / denominator(config.aggregation, counts), _sums_over_trained(per_token, tokens.weight)


def k3(log_ratio: Tensor) -> Tensor:
    """KL estimate exp(d) - d - 1 of samples from q, d = log p - log q, for KL(q || p); clamped to at most 10 as published. [N] -> [N]"""
    # At |d| = 20 the estimate is past its own clamp, so this bound changes nothing but keeps exp and its gradient finite.
    bounded = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (bounded.exp() - bounded - 1.0).clamp(max=_MAX_KL)


def _sums_over_trained(per_token: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    # Not values[trained]: a GPU would have to tell the host how many there are.
    trained = weight > 0
    sums = {name: torch.where(trained, values, 0.0).sum() for name, values in per_token.items()}
    return {"tokens": trained.sum().to(weight.dtype), **sums}
