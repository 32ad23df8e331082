"""Forks by the policy's own uncertainty: behind tool results that leave the policy unsure (ARPO, AEPO).

    prompt ─┬─ turn 1 ── result ─┬─ first k tokens of turn 2: entropy H ── rest of turn 2 ── ...     path 0
            │                    └─ turn 2' ── ...                                                  path 8, forked before those tokens
            └─ turn 1' ── ...                                                                       path 1

Paths wait for each other only for the first tokens of the first turns, with which all are compared.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from igpo_megatron.agent.settings import AepoBranching, ArpoBranching
from igpo_megatron.agent.trajectory import TurnWatch
from igpo_megatron.agent.trees.base import RunPath, TreeRollout, Uniform
from igpo_megatron.types import BranchPoint, Metric, RolloutGroup


def step_entropy(entropies: Sequence[float], config: ArpoBranching, vocab_size: int) -> float:
    """Entropy of the beginning of a turn, from nats per token (ARPO section 3.1; code: vllm_rollout_with_tools.py).

    sum / ln V as in the published code; `corrected` scales up a shorter beginning, so that it does not look more certain.
    """
    total = math.fsum(entropies[: config.entropy_tokens])
    if config.variant == "corrected":
        total *= config.entropy_tokens / min(len(entropies), config.entropy_tokens)
    return total / math.log(vocab_size)


def branch_probability(rise: float, consecutive: int, config: ArpoBranching) -> float:
    """Chance of a fork if entropy rose by `rise`: ARPO P = alpha + beta dH; AEPO lowers it by `consecutive` (see AepoBranching)."""
    probability = config.base_probability + config.entropy_weight * rise
    if isinstance(config, AepoBranching):
        damped = max(0.0, 1.0 - config.penalty * consecutive)
        if config.variant == "corrected":
            probability *= damped
        else:
            # The code forks iff (U + w dH) (1 - 0.05 c) >= bp, with bp = 1 - alpha.
            probability = 1.0 - (1.0 - config.base_probability) / damped + config.entropy_weight * rise if damped else 0.0
    return min(max(probability, 0.0), 1.0)


def initial_rollouts(root: float, tools: Sequence[float], samples: int, config: AepoBranching) -> int:
    """AEPO's budget of global samples, m = n sigmoid(budget_scale (H_root - mean H_tool)), from 1 to n.

    `tools`: entropies of the turns behind tool results; without any there is no difference, and m = n / 2. `published` averages over all
    turns, the first included, and takes floor(m) + 1.
    """
    steps = [root, *tools] if config.variant == "published" else tools
    difference = root - math.fsum(steps) / len(steps) if steps else 0.0
    wanted = samples / (1.0 + math.exp(-config.budget_scale * difference))
    return min(max(math.floor(wanted) + 1 if config.variant == "published" else round(wanted), 1), samples)


@dataclass(slots=True)
class EntropyWatch(TurnWatch):
    """The tree's record of one path; `run_trajectory` reports the first tokens of every turn."""

    tree: EntropyTree
    number: int
    """Of the trajectory."""

    label: str
    consecutive: int = 0
    """Decisions in a row, up to the newest, that forked."""

    first: float | None = None
    """Entropy of the first turn measured on this path itself."""

    steps: list[tuple[int, int, float]] = field(default_factory=list)
    """(node it continues, turn, entropy) of every turn."""

    @property
    def tokens(self) -> int:
        return self.tree.config.entropy_tokens

    @property
    def top_logprobs(self) -> int:
        return self.tree.config.top_logprobs

    async def measured(self, path: Sequence[int], turn: int, entropies: Sequence[float]) -> None:
        await self.tree.measured(self, list(path), turn, entropies)


class EntropyTree(TreeRollout[EntropyWatch]):
    """Forks paths as `rollout.branching.name=arpo` or `aepo` says."""

    def __init__(
        self, group: RolloutGroup, config: ArpoBranching, samples: int, *, run_path: RunPath, uniform: Uniform, vocab_size: int
    ) -> None:
        super().__init__(group, samples, run_path=run_path, uniform=uniform)
        self.config, self._vocab_size = config, vocab_size
        self._monitored: EntropyWatch | None = None
        self._roots: dict[int, float | None] = {}
        self._expected = 0
        self._roots_known = asyncio.Event()

    async def measured(self, watch: EntropyWatch, path: list[int], turn: int, entropies: Sequence[float]) -> None:
        """Record a turn's entropy and, behind a tool result, decide whether to fork before the turn."""
        entropy = step_entropy(entropies, self.config, self._vocab_size)
        earlier = watch.steps[-1][2] if watch.steps else None
        watch.steps.append((path[-1], turn, entropy))
        watch.first = entropy if watch.first is None else watch.first
        if turn == 1:
            self._root_known(watch.number, entropy)
        # The first turn of a fork continues a result for which the decision was already made.
        if earlier is not None and watch is not self._monitored:
            await self._decide(watch, path, turn, entropy if self.config.variant == "corrected" else earlier)

    def _watch(self, number: int, label: str) -> EntropyWatch:
        return EntropyWatch(self, number, label)

    def _ended(self, watch: EntropyWatch) -> None:
        self._root_known(watch.number, None)  # it may have ended before its first tokens

    async def _start(self) -> None:
        """Launch the initial samples; with AEPO's premonitor, one goes first and sets their number."""
        count = min(self.config.initial_rollouts, self._samples)
        if isinstance(self.config, AepoBranching) and self.config.premonitor:
            watch = self._monitored = self._launch([0], "0")
            await self._all_ended()
            entropies = [entropy for _, _, entropy in watch.steps]
            if entropies:
                count = initial_rollouts(entropies[0], entropies[1:], self._samples, self.config)
        self.group.metrics[Metric.INITIAL_ROLLOUTS] = float(count)
        self._expected = count
        for number in range(len(self._tasks), count):
            self._launch([0], str(number))
        self._check_roots()
        if self._monitored is not None:
            await self._decide_afterwards(self._monitored)

    async def _decide_afterwards(self, watch: EntropyWatch) -> None:
        """Make the fork decisions of the path that went first, now that the budget is known."""
        end = self._tasks[watch.number].result()
        for position in range(1, len(watch.steps)):
            node, turn, entropy = watch.steps[position]
            deciding = entropy if self.config.variant == "corrected" else watch.steps[position - 1][2]
            await self._decide(watch, end.path[: end.path.index(node) + 1] if node in end.path else [], turn, deciding)

    async def _decide(self, watch: EntropyWatch, path: list[int], turn: int, entropy: float) -> None:
        await self._roots_known.wait()
        if not path or self._free <= 0:
            return
        initial = self._initial(watch)
        probability = branch_probability(entropy - initial, watch.consecutive, self.config)
        behind = self._behind(path)
        before = watch.consecutive
        wanted = [attempt for attempt in range(self.config.beam - 1) if self._forks(watch.label, turn, attempt, probability)]
        watch.consecutive = before + 1 if wanted else 0
        children = self._fork(behind, watch.label, turn, wanted)
        for child in children:
            child.consecutive = watch.consecutive
        numbers, kind = tuple(child.number for child in children), self.config.entropy
        self.group.branch_points.append(BranchPoint(behind[-1], watch.number, turn, entropy, initial, kind, probability, before, numbers))

    def _forks(self, label: str, turn: int, attempt: int, probability: float) -> bool:
        if self.config.decision == "threshold":
            return probability > self.config.threshold
        return self._uniform(label, turn, attempt) < probability

    def _initial(self, watch: EntropyWatch) -> float:
        """The entropy from which a rise is measured."""
        roots = [root for root in self._roots.values() if root is not None]
        if self.config.variant == "published" or not roots:
            return watch.first or 0.0
        return math.fsum(roots) / len(roots)

    def _root_known(self, number: int, entropy: float | None) -> None:
        if not self._roots_known.is_set():
            self._roots.setdefault(number, entropy)
            self._check_roots()

    def _check_roots(self) -> None:
        if self._expected and len(self._roots) >= self._expected:
            self._roots_known.set()
