"""Losses that clip ratios in their own way: GSPO, CISPO, and BAPO, whose bounds depend on the advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from igpo_megatron.algorithms.losses.base import Aggregation, PolicyLoss
from igpo_megatron.algorithms.losses.tokens import Terms, Tokens, bounded_exp, clipped_surrogate, sequence_mean, unit
from igpo_megatron.types import Metric, StepCounts

if TYPE_CHECKING:
    from torch import Tensor


class Gspo(PolicyLoss):
    """GSPO (arXiv 2507.18071): PPO's clip on the geometric mean of a trajectory's ratios; turns keep their own advantages."""

    name: Literal["gspo"] = "gspo"
    clip_low: NonNegativeFloat = 3e-4
    """Trajectories below 1 - clip_low get no gradient when the advantage is negative."""

    clip_high: NonNegativeFloat = 4e-4
    """Trajectories above 1 + clip_high get no gradient when the advantage is positive."""

    @property
    def sequence_level(self) -> bool:
        return True


class Cispo(PolicyLoss):
    """CISPO (arXiv 2506.13585): REINFORCE weighted by a clipped ratio without gradient, so that no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Ratios count at least 1 - clip_low; 1 sets no bound, as in the paper."""

    clip_high: NonNegativeFloat = 0.28
    """Ratios count at most 1 + clip_high. The paper tunes it and does not state its value; this is DAPO's."""

    aggregation: Aggregation = "token_mean"
    """As for ppo; the paper takes token_mean."""


class Bapo(PolicyLoss):
    """BAPO (arXiv 2510.18927): PPO whose bounds move, before every optimizer step, until positive advantages have their share.

    Defaults are the paper's; its code has `first=lower`, `lower_step=0.05`, `positive_share=0.5`, and `lower=[0.6, 0.8]`,
    `upper=[1.2, 2.0]` in its settings file.
    """

    name: Literal["bapo"] = "bapo"
    lower: tuple[PositiveFloat, PositiveFloat] = (0.6, 0.9)
    """First and last value of the lower bound on ratios."""

    upper: tuple[PositiveFloat, PositiveFloat] = (1.2, 3.0)
    """First and last value of the upper bound on ratios."""

    first: Literal["upper", "lower"] = "upper"
    """The bound that moves first; the other one moves when it has come to its end."""

    lower_step: PositiveFloat = 0.02
    """How far the lower bound moves at a time."""

    upper_step: PositiveFloat = 0.05
    """How far the upper bound moves at a time."""

    positive_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of the clipped surrogate that positive advantages shall have; the bounds move until it is reached."""

    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With a negative advantage the ratio counts at most this much; null turns it off."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name, (first, last) in (("lower", self.lower), ("upper", self.upper)):
            if first > last:
                yield f"loss.{name}={[first, last]}: expected [first, last] with first <= last"
        if self.lower[1] > 1 or self.upper[0] < 1:
            yield f"loss.lower={list(self.lower)} and loss.upper={list(self.upper)}: expected bounds below and above 1"


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
    import torch  # not above: the settings of these losses are read without it

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
