"""Losses that depend on the entropy of each token: AEPO and HAPO."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from igpo_megatron.algorithms.losses.base import Aggregation, ClippedLoss
from igpo_megatron.algorithms.losses.tokens import Terms, Tokens, bounded_exp, clipped_surrogate, unit
from igpo_megatron.types import EntropyStats, StepCounts

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_ENTROPY = 1e-8


class Aepo(ClippedLoss):
    """AEPO's entropy-balanced policy optimisation (arXiv 2510.14545, section 3.3): PPO whose upper clip keeps its gradient."""

    without_entropies: ClassVar[str] = ", or entropy_advantage=none with balanced_tokens=all"

    name: Literal["aepo"] = "aepo"
    balanced_tokens: Literal["all", "high_entropy"] = "all"
    """Tokens whose gradient survives the upper clip: all (code), or the `high_entropy_share` least sure of a step (paper)."""

    high_entropy_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a step's tokens that count as high-entropy ones."""

    entropy_advantage: Literal["corrected", "published", "none"] = "corrected"
    """Advantages times 1 + a z, z the z-score of a token's entropy. `corrected`: entropies before the step, over all its tokens;
    `published`: current ones, over the tokens of a micro-batch, so that packing changes the gradient; `none`: what the published scripts
    really run, as they leave the code without entropies."""

    entropy_advantage_weight: NonNegativeFloat = 0.2
    """a."""

    @property
    def entropy_share(self) -> float | None:
        used = self.entropy_advantage == "corrected" or self.balanced_tokens == "high_entropy"
        return self.high_entropy_share if used else None

    @property
    def looks_beyond_a_token(self) -> str | None:
        return self.judges_trajectories or ("loss.entropy_advantage=published" if self.entropy_advantage == "published" else None)


class Hapo(ClippedLoss):
    """HAPO's clip and advantages (arXiv 2509.16591, sections 4.4 and 4.5): both follow the entropy of each token.

    Its group average is `advantage.statistics=tokens` of grpo. Its temperature per sampled token is not built.
    """

    name: Literal["hapo"] = "hapo"
    clip_high: NonNegativeFloat = 0.28
    """Ratios above 1 + clip_high, where entropy is high 1 + clip_high (1 + h), get no gradient when the advantage is positive."""

    high_entropy_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of a step's tokens that count as high-entropy ones (h > 0)."""

    clip_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How far h moves the bounds."""

    advantage_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How far h moves the advantages."""

    aggregation: Aggregation = "token_mean"
    """As for ppo; the paper takes token_mean."""

    @property
    def entropy_share(self) -> float | None:
        return self.high_entropy_share


def aepo(tokens: Tokens, counts: StepCounts, config: Aepo) -> Terms:
    """AEPO (arXiv 2510.14545): `ppo` with a clip that keeps the gradient, and advantages that depend on entropy.

    The loss has PPO's value, and where PPO's gradient of -A r is r grad logprob, here it is

        A > 0, r > 1 + clip_high:   (1 + clip_high) grad logprob        (PPO: 0)
        elsewhere                   as in PPO

    The code writes the clipped ratio as (1 + clip_high) / sg(r) * r, which is inf x 0 where r underflows; here it is
    (1 + clip_high) exp(logprob - sg(logprob)). A becomes A (1 + a z), z = (H - mean H) / std H, H [N] the token's entropy; where the
    factor is negative, positive and negative parts change places.
    """
    scaled = tokens.signed
    if config.entropy_advantage != "none":
        factor = 1.0 + config.entropy_advantage_weight * _entropy_scores(tokens, counts, config)[:, None]
        scaled = scaled * factor.clamp(min=0.0) + scaled.flip(-1) * (-factor).clamp(min=0.0)
    ratio, upper = bounded_exp(tokens.log_ratio), 1.0 + config.clip_high
    balanced = ratio > upper
    if config.balanced_tokens == "high_entropy":
        assert tokens.old_entropies is not None and counts.entropy is not None, "loss.balanced_tokens=high_entropy needs old entropies"
        balanced &= tokens.old_entropies > counts.entropy.threshold
    capped = (upper * unit(tokens.logprobs)).where(balanced, ratio.clamp(max=upper))
    return clipped_surrogate(ratio, scaled, config.clip_low, config.clip_high, config.dual_clip, capped)


def _entropy_scores(tokens: Tokens, counts: StepCounts, config: Aepo) -> Tensor:
    """[N] z-score of every token's entropy, without gradient."""
    if config.entropy_advantage == "corrected":
        assert tokens.old_entropies is not None and counts.entropy is not None, "loss.entropy_advantage=corrected needs old entropies"
        return (tokens.old_entropies - counts.entropy.mean) / counts.entropy.std
    assert tokens.entropy is not None, "loss.entropy_advantage needs the entropy of every token"
    current = tokens.entropy.detach()
    trained = tokens.weight > 0
    count = trained.sum()
    mean = current.where(trained, 0.0).sum() / count.clamp(min=1)
    std = ((current - mean).where(trained, 0.0).square().sum() / (count - 1).clamp(min=1)).sqrt()
    return (current - mean) / std.where(std > 0, 1.0)


def hapo(tokens: Tokens, counts: StepCounts, config: Hapo) -> Terms:
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
    ratio = bounded_exp(tokens.log_ratio)
    neutral = (ratio > 1.0 - clip_low / 2) & (ratio < 1.0 + clip_high / 2)
    scaled = (1.0 + config.advantage_weight * position).where((position > 0) ^ neutral, 1.0)
    return clipped_surrogate(ratio, tokens.signed * scaled[:, None], clip_low, clip_high, config.dual_clip)


def entropy_position(entropies: Tensor, stats: EntropyStats) -> Tensor:
    """h in [-1, 1] (HAPO, arXiv 2509.16591, eq. 5 and 6): where ln H lies between the step's least (-1), its threshold (0) and most (1).

    The deviation that eq. 5 divides by cancels in eq. 6. The published code divides by the negative least, which makes h of low
    entropies positive, too. [N] -> [N]
    """
    lowest, middle, highest = (math.log(max(value, _LEAST_ENTROPY)) for value in (stats.lowest, stats.threshold, stats.highest))
    rise = entropies.clamp(min=_LEAST_ENTROPY).log() - middle
    above, below = rise / max(highest - middle, _LEAST_ENTROPY), rise / max(middle - lowest, _LEAST_ENTROPY)
    return above.where(rise > 0, below).clamp(-1.0, 1.0)
