"""Rollouts for one training step after another, begun up to `rollout.max_staleness` steps ahead of it.

    weights      v0 ────────────── v1 ────────────── v2 ────────────── v3 ──
    trainer         wait │ train 1 │ wait │ train 2 │ wait │ train 3 │        step s updates the weights v(s-1)
    batch 1      ▇▇▇▇▇▇▇▇┘         ╷                 ╷                        k = max_staleness = 1: batch s begins
    batch 2      ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇┘          ╷                        when the weights v(s-1-k) are there
    batch 3                         ▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇┘

Order: batches are trained in the order in which their questions were drawn, so a run that is stopped and resumed trains the same questions
at the same steps. Bound: nothing of batch s is sampled before v(s-1-k), so no token is older than k updates when it is trained; a weight
transfer pauses the engines, and what was being sampled goes on with the new weights. Back-pressure: at most k + 1 batches are under way,
because only new weights open the next one. With k = 0 a batch begins when it is asked for: the synchronous trainer.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from igpo_megatron.algorithms.advantages.outcome import GREEDY_REWARD
from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.config.schema import Config
from igpo_megatron.tools.tally import Tally, tally_metrics
from igpo_megatron.types import Metric, Prompt, RolloutGroup, RunStopped

if TYPE_CHECKING:
    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.data.prompts import PromptStream, StreamState

logger = logging.getLogger(__name__)

MOST_DRAWS = 100
"""Times that a batch draws questions in place of those that do not fit the context."""


@dataclass(slots=True)
class Batch:
    """The questions of one training step and their rollouts."""

    step: int
    ordinals: list[int]
    """Everything drawn for it, groups that were replaced included."""

    tallies: Mapping[str, Tally]
    asked: Counter[str] = field(default_factory=Counter)
    """Question id -> groups of it that were begun for this step: a question that comes again is sampled with other seeds."""

    too_long: int = 0
    """Number of questions drawn that do not fit the context. They are not asked, and not drawn again before the next epoch."""

    progress: float = 0.0
    rollouts: Future[list[RolloutGroup]] = field(default_factory=Future)


class RolloutQueue:
    """Batches in the order of their steps. Closing the rollouter ends what is under way."""

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        rollouter: Rollouter,
        *,
        first_step: int,
        on_progress: Callable[[float], None] | None = None,
        too_long: Callable[[Prompt], str | None] = lambda prompt: None,
    ) -> None:
        """`too_long`: why a question leaves no room for a turn, or None. The next question takes its place. Called by one thread."""
        self._too_long, self._logged_too_long = too_long, False
        self._config, self._stream, self._rollouter, self._on_progress = config, stream, rollouter, on_progress
        self._batches: dict[int, Batch] = {}
        self._newest = first_step - 1
        self._awaited = 0
        self.successes = SuccessBuffer(config.rollout.replay_successes, config.rollout.success_above)
        self._drawing = threading.Lock()  # replacements are drawn on the rollouter's thread

    def weights_arrived(self, version: int) -> None:
        """The engines serve the weights `version`: the batches that were waiting for them begin."""
        ahead = self._config.rollout.max_staleness
        if ahead:
            self._open_through(version + 1 + ahead)

    def take(self, step: int) -> list[RolloutGroup]:
        """Wait for the scored groups of a step. Raises RunStopped where a rollout did, or where a token is too old to be trained."""
        self._open_through(step)
        batch = self._batches[step]
        self._awaited = step
        self._show(batch, batch.progress)
        groups = batch.rollouts.result()
        if self._config.run.stop_after != "none":
            return groups
        check_staleness(groups, step, self._config.rollout.max_staleness)
        return self.successes.exchange(groups, step)

    def done(self, step: int) -> dict[str, float]:
        """Call when the groups of `step` are trained or written: their questions are not asked again. Returns metrics of their tools."""
        batch = self._batches.pop(step)
        with self._drawing:
            self._stream.done(batch.ordinals)
        return tally_metrics(batch.tallies) | {"questions_too_long": float(batch.too_long)}

    def state(self) -> StreamState:
        """State for a checkpoint: a resumed run asks the questions again that are under way or untrained, and no others."""
        with self._drawing:
            return self._stream.state()

    def _open_through(self, step: int) -> None:
        """Let the batches of all steps up to `step` begin."""
        for number in range(self._newest + 1, min(step, self._config.run.steps) + 1):
            batch = Batch(number, [], self._rollouter.tallies())
            self._draw(batch)
            batch.rollouts = self._rollouter.start(self._roll_out(batch))
            self._batches[number], self._newest = batch, number

    async def _roll_out(self, batch: Batch) -> list[RolloutGroup]:
        """New trajectories with their rewards; with `rollout.resample` groups of equal rewards are replaced (DAPO, arXiv 2503.14476)."""
        rollout = self._config.rollout
        sample = partial(
            self._rollouter.run, salt=batch.step, tallies=batch.tallies, asked=batch.asked, on_progress=partial(self._show, batch)
        )
        kept: list[RolloutGroup] = []
        spare: list[RolloutGroup] = []
        ordinals = batch.ordinals
        for left in range(rollout.resample, -1, -1):
            groups = await sample(
                [self._stream.question(ordinal) for ordinal in ordinals],
                samples=rollout.samples_per_prompt,
                temperature=None,
                probe=True,
                branch=True,
                close_at=rollout.close_at,
            )
            self._score(groups)
            for group in groups:
                (spare if rollout.resample > 0 and has_equal_rewards(group) else kept).append(group)
            if len(kept) >= rollout.prompts_per_step or not left:
                break
            ordinals = self._draw(batch)
        groups = [*kept, *spare][: rollout.prompts_per_step]
        if self._config.advantage.needs_greedy:
            greedy = await sample([group.prompt for group in groups], samples=1, temperature=0.0)
            self._score(greedy)
            for group, baseline in zip(groups, greedy, strict=True):
                (trajectory,) = baseline.trajectories
                group.metrics[GREEDY_REWARD] = trajectory.reward if baseline.trained else math.nan
        return groups

    def _draw(self, batch: Batch) -> list[int]:
        """Ordinals of `prompts_per_step` more questions for a batch. Raises RunStopped where hardly any question fits the context."""
        wanted, fitting = self._config.rollout.prompts_per_step, list[int]()
        with self._drawing:
            for _ in range(MOST_DRAWS):
                drawn = self._stream.draw(wanted - len(fitting))
                fit = [ordinal for ordinal in drawn if self._has_room(self._stream.question(ordinal))]
                self._stream.done(set(drawn) - set(fit))
                batch.too_long += len(drawn) - len(fit)
                fitting += fit
                if len(fitting) == wanted:
                    batch.ordinals += fitting
                    return fitting
        raise RunStopped(
            f"of {len(fitting) + batch.too_long} questions drawn for step {batch.step}, {batch.too_long} leave no room for a turn in "
            f"rollout.max_context={self._config.rollout.max_context}; raise it, or choose other questions"
        )

    def _has_room(self, prompt: Prompt) -> bool:
        """Whether a question leaves room for a turn; the first that does not is logged."""
        reason = self._too_long(prompt)
        if reason is not None and not self._logged_too_long:
            self._logged_too_long = True
            logger.warning("question %s: %s. The next one takes its place; the metric questions_too_long counts them", prompt.id, reason)
        return reason is None

    def _score(self, groups: Sequence[RolloutGroup]) -> None:
        for group in groups:
            score(group, self._config)

    def _show(self, batch: Batch, share: float) -> None:
        """Report the progress of the batch that is waited for."""
        batch.progress = share
        if self._on_progress and batch.step == self._awaited:
            self._on_progress(share)


def has_equal_rewards(group: RolloutGroup) -> bool:
    """Whether all trained trajectories have the same reward, so that outcomes teach nothing."""
    return len({trajectory.reward for trajectory in group.trained}) < 2


def staleness(groups: Sequence[RolloutGroup], step: int) -> list[tuple[int, int]]:
    """(updates between the weights that sampled it and those it updates, tokens) of every turn that `step` trains."""
    turns = {
        (number, index)
        for number, group in enumerate(groups)
        for end in group.trained
        for index in end.path
        if group.nodes[index].kind == "action"
    }
    nodes = [groups[number].nodes[index] for number, index in sorted(turns)]
    return [(step - 1 - node.weight_version, len(node.token_ids)) for node in nodes if node.weight_version is not None]


def staleness_metrics(groups: Sequence[RolloutGroup], step: int) -> dict[str, float]:
    """Mean over tokens and largest number of updates between sampling and training; empty where nothing is trained."""
    found = staleness(groups, step)
    tokens = sum(count for _, count in found)
    if not tokens:
        return {}
    return {
        Metric.STALENESS_MEAN: sum(behind * count for behind, count in found) / tokens,
        "staleness_max": float(max(behind for behind, _ in found)),
    }


def check_staleness(groups: Sequence[RolloutGroup], step: int, allowed: int) -> None:
    """Raises RunStopped where a token was sampled by weights older than allowed, or by weights that do not exist yet."""
    for behind, _ in staleness(groups, step):
        if not 0 <= behind <= allowed:
            raise RunStopped(
                f"step {step} was given a turn sampled by the weights of version {step - 1 - behind}, expected versions "
                f"{max(0, step - 1 - allowed)} to {step - 1} (rollout.max_staleness={allowed}): an engine served the wrong weights"
            )
