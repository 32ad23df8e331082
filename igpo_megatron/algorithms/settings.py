"""Settings of reward and information gain. Those of an advantage and a loss stand beside its function (advantages/, losses/)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from igpo_megatron.algorithms.advantages.registry import Advantage
from igpo_megatron.algorithms.losses.registry import Loss
from igpo_megatron.algorithms.outcomes import Outcome
from igpo_megatron.settings import Section

PUBLISHED_PROBE = "\nNow there's enough information to answer\n</think>\n<answer>\n{answer}\n</answer><|im_end|>"
"""Probe text of the published IGPO code; it continues a forced `<think>`."""


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
