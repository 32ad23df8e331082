"""Settings of the algorithms: reward and information gain, one section per advantage, one section per loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from igpo_megatron.settings import HOOK, HOOKED, OURS, Hooked, HookName, Section, ours_or_hooked

PUBLISHED_PROBE = "\nNow there's enough information to answer\n</think>\n<answer>\n{answer}\n</answer><|im_end|>"
"""Probe text of the published IGPO code; it continues a forced `<think>`."""


BuiltinOutcome = Literal["f1", "em", "em_squad", "f1_multiset"]
Outcome = Annotated[Annotated[BuiltinOutcome, Tag(OURS)] | Annotated[HookName, Tag(HOOKED)], Discriminator(ours_or_hooked)]


class Reward(Section):
    """Outcome reward and information gain."""

    outcome: Outcome = "f1"
    """Score of a well-formed answer, best over all aliases: F1 of sets of words or exact match (IGPO: articles count), exact match after
    SQuAD's normalisation (Search-R1: they do not), or F1 after it (ARPO), in which repeated words count. Or a function of your own,
    (answer, accepted answers) -> float."""

    format_penalty: float = -2.0
    """Reward of a malformed trajectory (IGPO -2, ARPO -1)."""

    tool_bonus: NonNegativeFloat = 0.0
    """Added to a reward above zero where both search and python were used and returned something (ARPO 0.1)."""

    overlong: tuple[NonNegativeInt, PositiveInt] | None = None
    """Overlong shaping (DAPO, arXiv 2503.14476): sampled tokens of a trajectory from which the reward falls, and where it has fallen by 1
    and stays; null leaves length alone."""

    gain: Literal["log_prob_diff", "prob_diff", "none"] = "log_prob_diff"
    """Value whose rise over a turn is the turn's gain: mean log-prob of the answer, its exponential, or no gains at all."""

    probe_template: str = PUBLISHED_PROBE
    """Text appended to the context to ask for the answer; `{answer}` is the ground truth and only its tokens are scored."""

    probe_alias: Literal["first", "shortest", "max"] = "first"
    """Which alias is probed: the first, the one with fewest tokens, or every alias with the best value taken."""

    probe_max_tokens: PositiveInt = 64
    """Ground-truth tokens probed at most; longer answers are cut (whole-page aliases exist in NQ)."""

    probe_temperature: Literal[1, "sampling"] = 1
    """What the logits of probes are divided by: 1, so that gains are differences of the policy's own log-probs (paper), or
    `rollout.temperature`, as those of sampled tokens are (published code). Both are the same where that is 1."""

    scorer: Literal["fold", "engine", "batched", "sequential"] = "fold"
    """`fold`: probes are leaves of the packed tree in the old-log-prob pass; `engine`: vLLM scores them beside the next turn's
    generation; `batched`, `sequential`: the published schemes, every probe with its whole context (references)."""

    evidence: bool = False
    """A second probe per turn, with the newest tool result hidden, splits each gain into evidence and own reasoning."""

    def problems(self) -> Iterator[str]:
        if self.overlong is not None and self.overlong[0] >= self.overlong[1]:
            yield f"reward.overlong={list(self.overlong)}: expected [start, end] in tokens with start < end"
        if self.gain == "none":
            if self.scorer != "fold":
                yield f"reward.scorer={self.scorer} scores probes, reward.gain=none asks for none; leave reward.scorer at its default"
            if self.evidence:
                yield "reward.evidence=true splits gains, reward.gain=none asks for none; set one of them differently"
        elif (found := self.probe_template.count("{answer}")) != 1:
            yield f"reward.probe_template={self.probe_template!r}: expected {{answer}} exactly once, found it {found} times"


class AdvantageSection(Section):
    """What a run asks of every advantage."""

    needs_probes: ClassVar[bool] = False
    """It reads `trajectory.gains`, so that probes are scored."""

    needs_greedy: ClassVar[bool] = False
    """It reads the reward of a greedy trajectory, which is sampled beside the group."""

    compares_samples: ClassVar[bool] = True
    """It is zero for a question with a single sample."""


class Igpo(AdvantageSection):
    """IGPO (arXiv 2510.14967): turn gains and outcome, normalised over the group, summed over the remaining turns."""

    needs_probes: ClassVar[bool] = True

    name: Literal["igpo"] = "igpo"
    normalise: Literal["separate", "joint"] = "separate"
    """z-score gains and outcomes each among themselves (paper) or in one population (code default)."""

    divide_by_std: bool = True
    """False subtracts the mean only."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between; applied after normalisation."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class IgpoLoo(AdvantageSection):
    """IGPO with a leave-one-out baseline per turn index instead of mean subtraction before summing."""

    needs_probes: ClassVar[bool] = True

    name: Literal["igpo_loo"] = "igpo_loo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount per turn."""

    gain_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of gains at the first and last step, linear between."""

    outcome_weight: tuple[float, float] = (1.0, 1.0)
    """Weight of the outcome at the first and last step."""


class Grpo(AdvantageSection):
    """GRPO (arXiv 2402.03300): group z-score of the outcome, the same for every turn."""

    name: Literal["grpo"] = "grpo"
    divide_by_std: bool = True
    """False subtracts the mean only (Dr. GRPO, arXiv 2503.20783)."""

    statistics: Literal["trajectories", "tokens"] = "trajectories"
    """What mean and std are taken over; `tokens` counts every trajectory by its length (HAPO's token-level group average, 2509.16591)."""


class Rloo(AdvantageSection):
    """RLOO (arXiv 2402.14740): outcome minus the mean outcome of the other samples."""

    name: Literal["rloo"] = "rloo"


class GiGpo(AdvantageSection):
    """GiGPO (arXiv 2505.10978): group z-score of the outcome plus that of the discounted outcome among visits of the same state."""

    name: Literal["gigpo"] = "gigpo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Discount of the outcome per remaining turn, for the comparison within a state."""

    step_weight: NonNegativeFloat = 1.0
    """Weight of the comparison within a state."""

    divide_by_std: bool = True
    """False subtracts means only, in both parts."""


class Eapo(AdvantageSection):
    """EAPO (IterResearch, arXiv 2511.07327, eq. 5): the outcome discounted per remaining turn, z-scored over all turns of the group.

    Its downsampling to a multiple of the data-parallel size is not needed here: ranks with fewer rows get blank ones.
    """

    name: Literal["eapo"] = "eapo"
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Discount of the outcome per remaining turn. The paper asks for less than 1 and does not state its value."""


class Rapo(AdvantageSection):
    """RAPO's advantage scaling (Fathom-DeepResearch, arXiv 2509.24107, eq. 6): GRPO's advantages, times groups per group that differs."""

    name: Literal["rapo"] = "rapo"


class Arpo(AdvantageSection):
    """ARPO (arXiv 2507.19849, section 3.2): group z-score of the outcome, on trees."""

    name: Literal["arpo"] = "arpo"
    attribution: Literal["soft", "hard"] = "soft"
    """A turn that several trajectories share is trained with the advantage of each (soft, published) or with their mean (hard)."""


class ReinforcePp(AdvantageSection):
    """REINFORCE++ (arXiv 2501.03262): the outcome, whitened over the whole batch."""

    compares_samples: ClassVar[bool] = False

    name: Literal["reinforce_pp"] = "reinforce_pp"


class ReinforcePpBaseline(AdvantageSection):
    """REINFORCE++-baseline (arXiv 2501.03262): outcome minus the mean of its group, whitened over the whole batch."""

    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class ReMax(AdvantageSection):
    """ReMax (arXiv 2310.10505): outcome minus that of a greedy trajectory, which is sampled beside the group and not trained."""

    compares_samples: ClassVar[bool] = False
    needs_greedy: ClassVar[bool] = True

    name: Literal["remax"] = "remax"


class HookedAdvantage(Hooked):
    """An advantage of your own: (group, these settings, progress in [0, 1]) sets the `turn_advantages` of all in `group.trained`."""

    needs_probes: bool = False
    """It reads `trajectory.gains`, so that probes are scored."""

    needs_greedy: bool = False
    """It reads the reward of a greedy trajectory (`group.metrics["greedy_reward"]`), which is sampled beside the group."""

    compares_samples: bool = True
    """It is zero for a question with a single sample."""

    over_batch: HookName | None = None
    """Another function, which is called with all groups of the step once each has its advantages."""


BuiltinAdvantage = Annotated[
    Igpo | IgpoLoo | Grpo | Rloo | Arpo | GiGpo | Eapo | Rapo | ReinforcePp | ReinforcePpBaseline | ReMax,
    Field(discriminator="name"),
]
Advantage = Annotated[
    Annotated[BuiltinAdvantage, Tag(OURS)] | Annotated[HookedAdvantage, Tag(HOOKED)],
    Discriminator(ours_or_hooked),
]

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


class LossSection(Section):
    """What a run asks of every loss, answered as by one that learns from demonstrations."""

    name: str

    @property
    def learns_from_rewards(self) -> bool:
        """Trajectories are scored and compared; the loss has advantages."""
        return False

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


class Ppo(PolicyLoss):
    """Clipped policy gradient (PPO, arXiv 1707.06347) with dual clip (arXiv 1912.09729) and asymmetric bounds."""

    name: Literal["ppo"] = "ppo"
    clip_low: NonNegativeFloat = 0.2
    """Ratios below 1 - clip_low get no gradient when the advantage is negative."""

    clip_high: NonNegativeFloat = 0.2
    """Ratios above 1 + clip_high get no gradient when the advantage is positive."""

    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With a negative advantage the ratio counts at most this much; null turns it off."""


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


class Aepo(Ppo):
    """AEPO's entropy-balanced policy optimisation (arXiv 2510.14545, section 3.3): PPO whose upper clip keeps its gradient."""

    without_entropies: ClassVar[str] = ", or entropy_advantage=none with balanced_tokens=all"

    name: Literal["aepo"] = "aepo"  # type: ignore[assignment]
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


class Hapo(Ppo):
    """HAPO's clip and advantages (arXiv 2509.16591, sections 4.4 and 4.5): both follow the entropy of each token.

    Its group average is `advantage.statistics=tokens` of grpo. Its temperature per sampled token is not built.
    """

    name: Literal["hapo"] = "hapo"  # type: ignore[assignment]
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


class Sft(LossSection):
    """Cross-entropy on the action tokens of demonstrations."""

    aggregation: ClassVar[Aggregation] = "token_mean"

    name: Literal["sft"] = "sft"


BuiltinLoss = Annotated[Ppo | Aepo | Hapo | Bapo | Gspo | Cispo | Sft, Field(discriminator="name")]
Loss = Annotated[Annotated[BuiltinLoss, Tag(OURS)] | Annotated[HookedLoss, Tag(HOOKED)], Discriminator(ours_or_hooked)]


def algorithm_problems(reward: Reward, advantage: Advantage, loss: Loss) -> Iterator[str]:
    """Where a step of these three lacks gains, or a pass to take them in."""
    if not (loss.learns_from_rewards and advantage.needs_probes):
        return
    if reward.gain == "none":
        yield f"reward.gain=none leaves advantage.name={advantage.name} without gains; measure them, or set advantage.name=grpo"
    elif reward.scorer == "engine":
        if reward.evidence:
            yield "reward.evidence=true hides tool results in the trainer's pass; use reward.scorer=fold"
    elif loss.skips_old_logprobs:
        yield (
            f"loss.old_logprobs=engine runs no pass that reward.scorer={reward.scorer} could score probes in; "
            "use reward.scorer=engine, or loss.old_logprobs=recompute"
        )
