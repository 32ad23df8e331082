"""Losses that clip ratios in their own way: GSPO, CISPO, and BAPO, whose bounds depend on the advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igpo_megatron.algorithms.losses.tokens import Terms, Tokens, bounded_exp, clipped_surrogate, sequence_mean, unit
from igpo_megatron.algorithms.settings import Bapo, Cispo, Gspo
from igpo_megatron.types import Metric, StepCounts


def gspo(tokens: Tokens, counts: StepCounts, config: Gspo) -> Terms:
    """GSPO-token (arXiv 2507.18071, eq. 13 and 14): PPO's clip with one ratio per trajectory.

    With sg[] for "no gradient" and y the trajectory's tokens:

        s   = exp(1/|y| sum_t (logprob_t - old_logprob_t)),        s_t = sg[s] * exp(logprob_t - sg[logprob_t])
        token's loss = -min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

    With one advantage per trajectory and `sequence_mean` value and gradient are those of GSPO. A token has one ratio only, so
    trajectories must not share tokens.
    """
    assert tokens.sequence is not None, "gspo needs the trajectory of every token"
    ratio = bounded_exp(sequence_mean(tokens.log_ratio.detach(), tokens.sequence, tokens.sequences)) * unit(tokens.logprobs)
    return clipped_surrogate(ratio, tokens.signed, config.clip_low, config.clip_high, None)


def cispo(tokens: Tokens, counts: StepCounts, config: Cispo) -> Terms:
    """CISPO (arXiv 2506.13585, eq. 4 and 5): a token's loss is -sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob."""
    ratio = bounded_exp(tokens.log_ratio.detach())
    counted = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    positive, negative = tokens.signed.unbind(-1)
    surrogate = ((negative - positive) * counted * tokens.logprobs).sum()
    return surrogate, {Metric.CLIP_FRACTION: (counted != ratio).to(ratio.dtype)}


def bapo(tokens: Tokens, counts: StepCounts, config: Bapo) -> Terms:
    """BAPO (arXiv 2510.18927): the loss of `ppo` between the bounds that `balanced_bounds` finds for the optimizer step."""
    assert counts.bounds is not None, "bapo needs the bounds of the step"
    lower, upper = counts.bounds
    return clipped_surrogate(bounded_exp(tokens.log_ratio), tokens.signed, 1.0 - lower, upper - 1.0, config.dual_clip)


def balanced_bounds(log_ratios: Sequence[Tensor], advantages: Sequence[Tensor], config: Bapo) -> tuple[float, float]:
    """BAPO (arXiv 2510.18927) for all rows of an optimizer step: log_ratios [N], advantages [N, 2] per row -> bounds l and h on ratios.

    With r the ratios, bounds l and h, and A+ and A- the two parts of the advantages, the share of the positive part is

        share = P / (P + M),    P = sum A+ min(r, h),    M = sum A- max(r, l)

    While it is below `positive_share`, h goes up to its end, then l, in steps (algorithm 1; the published code moves l first). As in the
    code, M counts the tokens that l clips, so a higher l takes gradient from negative tokens but never raises the share; and tokens are
    not weighted by the probability with which they were sampled, as the paper's sum is.
    """
    ratio = bounded_exp(torch.cat(list(log_ratios)))
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
    return bound["lower"], bound["upper"]
