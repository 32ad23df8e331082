"""Every loss by its name; section `loss`, which is made of the rows; and `objective`, by which all losses are trained.

What it multiplies, adds and divides is the same for all:

    Tokens ──mismatch──> advantages ──LOSSES[name]──> sum over tokens ──entropy bonus, KL term──> / count of the step ──> scalar

The scalar adds up over micro-batches and ranks to the loss of the whole step. Metrics are sums over trained tokens with their count in
`tokens`; they add up the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import NonNegativeInt, PositiveInt

from igpo_megatron.algorithms.losses.base import Aggregation, ClippedLoss, HeldOut, HookedLoss, LossSection, PolicyLoss
from igpo_megatron.algorithms.losses.clipped import Bapo, Cispo, Gspo, balanced_bounds, bapo, cispo, gspo
from igpo_megatron.algorithms.losses.entropy import Aepo, Hapo, aepo, hapo
from igpo_megatron.algorithms.losses.tokens import Terms, Tokens, bounded_exp, clipped_surrogate, k3, sequence_mean
from igpo_megatron.settings import load_hook, one_of, ours_or
from igpo_megatron.types import Metric, StepCounts

if TYPE_CHECKING:
    from torch import Tensor

LossResult = tuple["Tensor", dict[str, "Tensor"]]
"""(scalar with gradient, metric name -> detached sum over trained tokens)."""


class Ppo(ClippedLoss):
    """Clipped policy gradient (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729) and asymmetric bounds."""

    name: Literal["ppo"] = "ppo"


class Sft(LossSection):
    """Cross-entropy on the action tokens of demonstrations."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    name: Literal["sft"] = "sft"

    held_out: Path | None = None
    """Rollout file (parquet) of demonstrations that are not trained on. Their mean loss per action token at temperature 1 is measured, and
    the checkpoint with the least is kept as `checkpoints/best`."""

    held_out_every: PositiveInt = 20
    """Steps between these measurements. There is also one before the first and one after the last step."""

    patience: NonNegativeInt = 0
    """The run ends after so many measurements in a row without a new best; 0 trains all `run.steps`, which the schedule is made for."""

    @property
    def held_out_loss(self) -> HeldOut | None:
        return HeldOut(self.held_out, self.held_out_every, self.patience) if self.held_out is not None else None

    def problems(self) -> Iterator[str]:
        if self.held_out is not None and not self.held_out.is_file():
            yield f"loss.held_out={self.held_out}: no such file; expected a rollout file (parquet), as run.replay has it"
        if self.patience and self.held_out is None:
            yield f"loss.patience={self.patience} waits for a better held-out loss; set loss.held_out, or loss.patience=0"


class LossEntry(NamedTuple):
    """One row of `LOSSES`."""

    section: type[LossSection]
    """Its settings, and what a run has to prepare for it (old entropies, a reference)."""

    function: Callable[[Tokens, StepCounts, Any], Terms]
    """(tokens, counts of the step, its own section) -> its sum over tokens, which `objective` completes, and metrics per token."""

    bounds: Callable[[Sequence[Tensor], Sequence[Tensor], Any], tuple[float, float]] | None = None
    """Finds `counts.bounds` before each optimizer step: ([N] log-ratios, [N, 2] trained advantages, both per row, its own section) ->
    least and greatest ratio. It takes one more forward pass; None where the loss has bounds of its own, or none."""


def ppo(tokens: Tokens, counts: StepCounts, config: Ppo) -> Terms:
    """Clipped policy gradient (arXiv 1707.06347) with dual clip (arXiv 1912.09729).

    For one trajectory with advantage A, ratio r and bounds l = 1 - clip_low, h = 1 + clip_high, the token's loss is

        A > 0:  max(-A r, -A clip(r, l, h))                  = -A min(r, h)
        A < 0:  min(max(-A r, -A clip(r, l, h)), -A dual)    = |A| min(max(r, l), dual)        since dual > 1 >= l

    Both are linear in |A|, so trajectories that share the token need only the sums of their positive and of their negative parts.
    """
    return clipped_surrogate(bounded_exp(tokens.log_ratio), tokens.signed, config.clip_low, config.clip_high, config.dual_clip)


def sft(tokens: Tokens, counts: StepCounts, config: Sft) -> Terms:
    """Cross-entropy: -sum(weight * logprobs)."""
    return -(tokens.weight * tokens.logprobs).sum(), {Metric.NLL: -tokens.logprobs.detach()}


LOSSES: dict[str, LossEntry] = {
    "ppo": LossEntry(Ppo, ppo),
    "aepo": LossEntry(Aepo, aepo),
    "hapo": LossEntry(Hapo, hapo),
    "bapo": LossEntry(Bapo, bapo, bounds=balanced_bounds),
    "gspo": LossEntry(Gspo, gspo),
    "cispo": LossEntry(Cispo, cispo),
    "sft": LossEntry(Sft, sft),
}

if TYPE_CHECKING:  # mypy cannot see a type that is made of rows
    Loss = PolicyLoss | Sft
else:
    Loss = ours_or(HookedLoss, one_of(entry.section for entry in LOSSES.values()))


def entry_of(config: Loss) -> LossEntry:
    """The row of a loss; one of the user's own is imported. Raises UserError where it cannot be."""
    return LossEntry(HookedLoss, load_hook("loss.name", config.name)) if isinstance(config, HookedLoss) else LOSSES[config.name]


def objective(tokens: Tokens, counts: StepCounts, config: Loss) -> LossResult:
    """What a micro-batch adds to the loss of the step, with its gradient. What has a coefficient must be known: entropy, ref_logprobs.

    The KL term is k3 = exp(d) - d - 1 with d = ref - logprob, clamped to at most 10 as published: beyond that it has no gradient.
    """
    if isinstance(config, PolicyLoss) and config.mismatch != "none":
        tokens = replace(tokens, advantages=trained_advantages(tokens, config))
    total, per_token = entry_of(config).function(tokens, counts, config)
    if tokens.entropy is not None:
        per_token[Metric.ENTROPY] = tokens.entropy.detach()
    if isinstance(config, PolicyLoss):
        per_token[Metric.KL_OLD] = k3(tokens.log_ratio.detach())
        if config.entropy_coef:
            assert tokens.entropy is not None, "loss.entropy_coef needs the entropy of every token"
            total = total - config.entropy_coef * (tokens.weight * tokens.entropy).sum()
        if config.kl_coef:
            assert tokens.ref_logprobs is not None, "loss.kl_coef needs the reference log-probs of every token"
            reference_kl = k3(tokens.ref_logprobs - tokens.logprobs)
            per_token[Metric.KL_REF] = reference_kl.detach()
            total = total + config.kl_coef * (tokens.weight * reference_kl).sum()
    return total / denominator(config.aggregation, counts), _sums_over_trained(per_token, tokens.weight)


def token_weight(aggregation: Aggregation, num_tokens: int) -> float:
    """Weight of each token of a trajectory that has `num_tokens` trained tokens."""
    return 1.0 / num_tokens if aggregation == "sequence_mean" else 1.0


def denominator(aggregation: Aggregation, counts: StepCounts) -> float:
    """What the weighted sum over all tokens of the step is divided by."""
    count = counts.trained_tokens if aggregation == "token_mean" else counts.trajectories
    assert count > 0, "a step without trained tokens has no loss; skip it"
    return float(count)


def trained_advantages(tokens: Tokens, config: Loss) -> Tensor:
    """[N, 2] advantages, times what `loss.mismatch` makes of each token."""
    if not isinstance(config, PolicyLoss) or config.mismatch == "none":
        return tokens.signed
    assert tokens.old_logprobs is not None and tokens.behavior_logprobs is not None and tokens.sequence is not None
    factor = mismatch_factor(tokens.old_logprobs, tokens.behavior_logprobs, tokens.sequence, tokens.sequences, config)
    return tokens.signed * factor[:, None]


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
            return bounded_exp(log_ratio).clamp(max=high)
        case "mask":
            ratio = bounded_exp(log_ratio)
            return ratio.where((ratio >= low) & (ratio <= high), 0.0)
        case "mask_sequence":
            mean = bounded_exp(sequence_mean(log_ratio, sequence, sequences))
            return ((mean >= low) & (mean <= high)).to(log_ratio.dtype)
    return log_ratio.new_ones(log_ratio.shape)


def _sums_over_trained(per_token: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    # Not values[trained]: a GPU would have to tell the host how many there are.
    trained = weight > 0
    sums = {name: values.where(trained, 0.0).sum() for name, values in per_token.items()}
    return {Metric.TRAINED_TOKENS: trained.sum().to(weight.dtype), **sums}
