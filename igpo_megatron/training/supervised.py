"""Training on demonstrations: which of them make a step, their held-out loss, and when to stop for it.

run.replay ──Demonstrations──> groups of each step;   loss.held_out ──Supervision.metrics──> loss ──Progress──> best step, early stop
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from igpo_megatron.config.schema import Config
from igpo_megatron.observability.rollout_dump import RolloutRows
from igpo_megatron.observability.run_folder import step_name
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.packing.batches import balance
from igpo_megatron.types import Metric, RolloutGroup, UserError

if TYPE_CHECKING:
    from igpo_megatron.policy.policy import Policy

WINDOW = 8
"""Steps whose demonstrations are dealt together: enough to make them alike, few enough that an epoch's steps are not the last one's."""


class Demonstrations(Iterator[list[RolloutGroup]]):
    """The groups of one step after another, endlessly; every group of the file once per epoch."""

    def __init__(self, path: Path, config: Config, first_step: int = 1) -> None:
        """Begin with step `first_step`. Raises UserError for an unreadable file, an empty one, or one of another vocabulary."""
        self._rows, self._config = read_demonstrations(path, config), config
        self._step = first_step - 1
        self._epoch, self._plan = -1, self._planned(0)

    @property
    def epoch(self) -> float:
        """Passes through the file up to the step that was last given, that step included."""
        return self._step / len(self._plan)

    def __next__(self) -> list[RolloutGroup]:
        epoch, place = divmod(self._step, len(self._plan))
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._planned(epoch)
        self._step += 1
        return [self._rows[row] for row in self._plan[place]]

    def _planned(self, epoch: int) -> list[list[int]]:
        """Rows of every step of an epoch; all epochs have equally many steps."""
        size = self._config.rollout.prompts_per_step
        if self._config.data.shuffle:
            return dealt(self._rows.num_tokens, size, key=f"{self._config.run.seed} {epoch}")
        return in_order(self._rows.steps, size)


def read_demonstrations(path: Path, config: Config) -> RolloutRows:
    """The demonstrations of a file, of which there is one at least, in tokens of the model."""
    rows = RolloutRows(path, search=config.rollout.tool_name)
    if not len(rows):
        raise UserError(f"{path}: no demonstrations in it; write at least one")
    vocab = config.model.shape().get("vocab_size")
    if isinstance(vocab, int) and rows.last_token >= vocab:
        raise UserError(
            f"{path}: it has token {rows.last_token}, the vocabulary of model.path={config.model.path} ends at {vocab - 1}; "
            "make the demonstrations with this model's tokenizer"
        )
    return rows


def in_order(steps: Sequence[int], size: int) -> list[list[int]]:
    """Rows by the order of the file, at most `size` together, of one recorded step: `in_order([1, 1, 2], 2) == [[0, 1], [2]]`."""
    parts = [[*rows] for _, rows in groupby(range(len(steps)), key=steps.__getitem__)]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def dealt(num_tokens: Sequence[int], size: int, key: str) -> list[list[int]]:
    """Rows of every step of an epoch, each row once: shuffled by `key`, then steps of about `size` rows made alike in tokens.

    Steps of equal length would waste nothing either, since rows have no padding, but would be as unequal as the demonstrations are.
    """
    shuffled = random.Random(key).sample(range(len(num_tokens)), len(num_tokens))
    steps = -(-len(shuffled) // size)
    ends = [len(shuffled) * number // steps for number in range(steps + 1)]
    plan = []
    for first in range(0, steps, WINDOW):
        last = min(first + WINDOW, steps)
        window = shuffled[ends[first] : ends[last]]
        parts = balance([num_tokens[row] for row in window], last - first)
        plan += [[window[place] for place in part if place >= 0] for part in parts]
    return plan


def held_out_nll(policy: Policy, groups: Sequence[RolloutGroup]) -> float:
    """Mean negative log-likelihood of the groups' action tokens at temperature 1, nats. Collective; the main rank has the groups."""
    from igpo_megatron.packing.tree import pack_for_scoring, per_node
    from igpo_megatron.policy import parallel

    rows = pack_for_scoring(
        groups, row_tokens=policy.config.packing.row_tokens, multiple=policy.row_multiple, scorer=None, ranks=policy.ranks.data_size
    )
    # By node: one that trajectories share may be in several rows.
    scored = {id(node): found for node, found in per_node(rows, policy.log_probs(rows, temperature=1.0), groups)}
    count = sum(map(len, scored.values()))
    mean: float = parallel.broadcast(-math.fsum(map(math.fsum, scored.values())) / count if count else math.nan)
    return mean


@dataclass(frozen=True, slots=True)
class Progress:
    """What the held-out losses have said so far; part of a checkpoint's state."""

    best_step: int | None = None
    best_nll: float | None = None
    worse: int = 0
    """Measurements since then, none of them better."""

    def after(self, step: int, nll: float) -> Self:
        """With one more measurement."""
        better = math.isfinite(nll) and (self.best_nll is None or nll < self.best_nll)
        return replace(self, best_step=step, best_nll=nll, worse=0) if better else replace(self, worse=self.worse + 1)


class Supervision:
    """Measures the held-out loss and says when to stop. Every rank calls every method at the same point; without a file all do nothing."""

    def __init__(
        self, policy: Policy, tracker: Tracker, replay: Iterator[Any] | None, checkpoints: Path, state: dict[str, Any] | None
    ) -> None:
        """`replay`: on the main rank, where groups come from. `state`: of the checkpoint that the run resumed from."""
        from igpo_megatron.policy import parallel

        config = policy.config
        self._policy, self._tracker, self._replay, self._steps = policy, tracker, replay, config.run.steps
        self._loss = config.loss.held_out_loss
        self._groups = parallel.on_main(policy.ranks, self._read) or []
        self.progress = Progress(**(state or {}).get("held_out", {}))
        best = self.progress.best_step
        # The best checkpoint was damaged and set aside: the next measurement is the best one that there is.
        if best and not parallel.broadcast((checkpoints / step_name(best)).is_dir()):
            self.progress = replace(self.progress, best_step=None, best_nll=None)

    @property
    def is_over(self) -> bool:
        """The run ends here, because the held-out loss has not fallen for `loss.patience` measurements."""
        return self._loss is not None and 0 < self._loss.patience <= self.progress.worse

    def metrics(self, step: int) -> dict[str, float]:
        """After a step, or before the first (0): its epoch, and the held-out loss where it is due."""
        metrics: dict[str, float] = {Metric.EPOCH: self._replay.epoch} if step and isinstance(self._replay, Demonstrations) else {}
        if self._loss is None or not (step == self._steps or step % self._loss.every == 0):
            return metrics
        with self._tracker.phase("eval"):
            nll = held_out_nll(self._policy, self._groups)
        self.progress = self.progress.after(step, nll)
        return metrics | {Metric.HELD_OUT_NLL: nll}

    def is_best(self, step: int) -> bool:
        """The held-out loss after this step is the least so far."""
        return step == self.progress.best_step

    def state(self) -> dict[str, Any]:
        """For a checkpoint's state, and the summary; the same on every rank. Empty without a held-out loss."""
        return {"held_out": asdict(self.progress)} if self._loss is not None else {}

    def _read(self) -> list[RolloutGroup]:
        if self._loss is None:
            return []
        rows = read_demonstrations(self._loss.file, self._policy.config)
        groups = [rows[row] for row in range(len(rows))]
        if not any(node.kind == "action" for group in groups if group.trained for node in group.nodes):
            raise UserError(f"{self._loss.file}: no demonstration in it has an action to measure; write it as run.replay is")
        return groups
