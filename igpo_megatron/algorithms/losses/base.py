"""What the sections of all losses share, and the section of one of your own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat

from igpo_megatron.settings import HOOK, Hooked, Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


class HeldOut(NamedTuple):
    """A loss that is measured beside training, and when the run ends for it."""

    file: Path
    every: int
    """Steps between measurements."""
    patience: int
    """Measurements in a row without a new best that end the run; 0 for none."""


class LossSection(Section):
    """What a run asks of every loss, answered as by one that learns from demonstrations. It has an `aggregation`, too."""

    name: str

    @property
    def learns_from_rewards(self) -> bool:
        """Trajectories are scored and compared; the loss has advantages."""
        return False

    @property
    def held_out_loss(self) -> HeldOut | None:
        """What is measured on demonstrations that are not trained on."""
        return None

    @property
    def skips_old_logprobs(self) -> bool:
        """Log-probs from before the step are those the engine sampled with; no pass is run for them."""
        return False

    @property
    def keeps_reference(self) -> bool:
        """A copy of the first weights is kept, for a KL term."""
        return False

    @property
    def entropy_share(self) -> float | None:
        """Share of a step's tokens whose entropy counts as high; None where the loss uses no entropies from before the step."""
        return None

    @property
    def uses_old_entropies(self) -> bool:
        """The pass before the step also takes the entropy of every token."""
        return self.entropy_share is not None

    @property
    def judges_trajectories(self) -> str | None:
        """The setting by which trajectories are weighed as a whole, which means nothing where they share turns; None: there is none."""
        return None

    @property
    def looks_beyond_a_token(self) -> str | None:
        """The setting with which a token's part of the loss is no function of its own log-prob and entropy; None: it is one."""
        return self.judges_trajectories


class PolicyLoss(LossSection):
    """What the losses of reinforcement learning share."""

    without_entropies: ClassVar[str] = ""
    """How to do without `uses_old_entropies`, as the sentence that refuses them goes on."""

    kl_coef: NonNegativeFloat = 0.001
    """Weight of the k3 KL estimate to the reference policy; 0 keeps no reference."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Log-probs that ratios are taken against: a forward pass of the policy before the step, or those the engine sampled with (no pass)."""

    aggregation: Aggregation = "sequence_mean"
    """Mean over all trained tokens (DAPO); mean over trajectories of the token mean (GRPO's and IGPO's papers) or of the token sum
    (Dr. GRPO; published IGPO code)."""

    mismatch: Literal["none", "truncate", "mask", "mask_sequence"] = "none"
    """What w, the probability of a token by the trainer over that by the engine that sampled it, does to its policy gradient. `truncate`:
    times min(w, high) (TIS). `mask`: times w within [low, high], 0 outside (IcePop, arXiv 2510.18855). `mask_sequence`: 0 for all tokens
    of a trajectory where the geometric mean of w is outside, 1 for the others."""

    mismatch_bounds: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0)
    """[low, high] of `mismatch`; TIS takes high = 2, IcePop 0.5 and 5."""

    @property
    def learns_from_rewards(self) -> bool:
        return True

    @property
    def skips_old_logprobs(self) -> bool:
        return self.old_logprobs == "engine"

    @property
    def keeps_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def sequence_level(self) -> bool:
        """Its ratios are of whole sequences: they do not add up over branches, so it refuses them."""
        return False

    @property
    def judges_trajectories(self) -> str | None:
        if self.mismatch == "mask_sequence":
            return "loss.mismatch=mask_sequence"
        return f"loss.name={self.name}" if self.sequence_level else None

    def problems(self) -> Iterator[str]:
        low, high = self.mismatch_bounds
        if not low < 1 < high:
            yield f"loss.mismatch_bounds={[low, high]}: expected [low, high] around 1, such as [0.5, 2.0]"
        if self.mismatch != "none" and self.skips_old_logprobs:
            yield (
                f"loss.mismatch={self.mismatch} compares the engine with a pass before the step, which loss.old_logprobs=engine leaves "
                "out; use loss.old_logprobs=recompute, or loss.mismatch=none"
            )
        if self.uses_old_entropies and self.skips_old_logprobs:
            yield (
                f"loss.name={self.name} uses entropies that loss.old_logprobs=engine runs no pass for; "
                f"use old_logprobs=recompute{self.without_entropies}"
            )


class ClippedLoss(PolicyLoss):
    """Bounds on ratios, with dual clip (arXiv 1912.09729)."""

    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low get no gradient when the advantage is negative."""

    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""

    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With a negative advantage the ratio counts at most this much; null turns it off."""


class HookedLoss(PolicyLoss, Hooked):
    """A loss of your own: (tokens, counts, these settings) -> (sum over tokens with gradient, per-token metrics).

    `mismatch`, `kl_coef`, `entropy_coef` and the division by `aggregation`'s count are applied to it as to ours.
    """

    name: str = Field(pattern=HOOK)
    """`package.module:function`, importable where the run starts."""

    old_entropies: bool = False
    """It reads `tokens.old_entropies` and `counts.entropy`."""

    high_entropy_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a step's tokens that count as high-entropy ones."""

    looks_at: Literal["token", "row", "trajectory"] = "token"
    """What a token's part of it depends on: its own log-prob and entropy alone, other tokens of the row, or the whole trajectory."""

    @property
    def sequence_level(self) -> bool:
        return self.looks_at == "trajectory"

    @property
    def entropy_share(self) -> float | None:
        return self.high_entropy_share if self.old_entropies else None

    @property
    def looks_beyond_a_token(self) -> str | None:
        return self.judges_trajectories or ("loss.looks_at=row" if self.looks_at == "row" else None)
