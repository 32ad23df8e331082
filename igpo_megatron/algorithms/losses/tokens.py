"""The input of a loss, and formulas that losses share.

Shapes: N scored tokens of a micro-batch. A token that several trajectories share (a tree) appears once; its part in each of them is
summed into `weight` [N] and `advantages` [N, 2] beforehand:

    weight     = sum over the trajectories through the token of w,  w = `token_weight(aggregation, trained tokens of the trajectory)`
    advantages = (sum of w * max(A, 0),  sum of w * max(-A, 0)),    A = that trajectory's advantage for the turn

A token with weight 0 is not trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from igpo_megatron.types import Metric

if TYPE_CHECKING:  # settings stand beside the losses, and are read without torch
    from torch import Tensor

Terms = tuple["Tensor", dict[str, "Tensor"]]
"""(sum over tokens with gradient, metric name -> [N] without gradient)."""

_MAX_LOG_RATIO = 20.0
_MAX_KL = 10.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """The N scored tokens of a micro-batch. None means unknown; a loss that needs the field asserts that it is there."""

    logprobs: Tensor
    """[N] fp32, with gradient."""

    weight: Tensor
    """[N] fp32 (module docstring)."""

    advantages: Tensor | None = None
    """[N, 2] fp32 (module docstring)."""

    old_logprobs: Tensor | None = None
    """[N] fp32, from before the step."""

    behavior_logprobs: Tensor | None = None
    """[N] fp32, by the engine that sampled the tokens."""

    ref_logprobs: Tensor | None = None
    """[N] fp32, of the reference policy."""

    entropy: Tensor | None = None
    """[N] fp32, nats, with gradient."""

    old_entropies: Tensor | None = None
    """[N] fp32, nats, from before the step."""

    sequence: Tensor | None = None
    """[N] int64, the trajectory of every token, for losses on whole trajectories."""

    sequences: int = 0
    """Number of trajectories, more than the greatest of `sequence`; a plain number, to avoid a device synchronisation."""

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


def sequence_mean(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Every token's mean over the tokens of its own trajectory, of `sequences`. [N], [N] -> [N]"""
    sums, tokens = values.new_zeros(sequences), values.new_zeros(sequences)
    sums.index_add_(0, sequence, values)
    tokens.index_add_(0, sequence, values.new_ones(values.shape))
    return (sums / tokens)[sequence]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    # Bounded before exp: an infinite ratio would be clipped to a finite loss but leave a nan gradient (0 * inf).
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def unit(logprobs: Tensor) -> Tensor:
    """[N] ones whose gradient is that of the log-probs."""
    return (logprobs - logprobs.detach()).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None,
    capped: Tensor | None = None,
) -> Terms:
    """Sum over tokens of the loss derived in `ppo`; `clip_fraction`, 1 where a token was clipped.

    Bounds may be [N]; `capped` [N] replaces min(r, h).
    """
    positive, negative = advantages.unbind(-1)
    lower, upper = 1.0 - clip_low, 1.0 + clip_high
    floored = ratio.clamp(min=lower)
    floored = floored.clamp(max=dual_clip) if dual_clip else floored
    total = (negative * floored - positive * (ratio.clamp(max=upper) if capped is None else capped)).sum()
    fixed_ratio = ratio.detach()
    clipped = ((positive > 0) & (fixed_ratio > upper)) | ((negative > 0) & (fixed_ratio < lower))
    if dual_clip:
        clipped |= (negative > 0) & (fixed_ratio > dual_clip)
    return total, {Metric.CLIP_FRACTION: clipped.to(ratio.dtype)}


def k3(log_ratio: Tensor) -> Tensor:
    """KL estimate exp(d) - d - 1 of samples from q, d = log p - log q, for KL(q || p); clamped to at most 10 as published. [N] -> [N]"""
    # At |d| = 20 the estimate is past its own clamp, so this bound changes nothing but keeps exp and its gradient finite.
    bounded = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return (bounded.exp() - bounded - 1.0).clamp(max=_MAX_KL)
