"""Forks and stops by probes: the value of a state is the probability of the true answer in it.

    path 0   v_0 ── turn 1 ── v_1 ── turn 2 ── v_2 ── ...      fork behind turn t where the samples' v_t are far apart
    path 1   v_0 ── turn 1 ── v_1 ── turn 2 ── v_2 ── ...      stop where a path's own v_t no longer moves: ask for the answer

A fork needs the values of the group's first samples at the same turn. The path does not wait for them: it goes on, and the fork starts
later from the earlier state. A stop needs only the path's own values, for which its next turn waits. Every decision is recorded in
`RolloutGroup.value_points` with its probability.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from statistics import pstdev

from igpo_megatron.agent.prober import Prober, StateValue
from igpo_megatron.agent.settings import GainBranching
from igpo_megatron.agent.trajectory import TurnWatch
from igpo_megatron.agent.trees.base import RunPath, TreeRollout, Uniform
from igpo_megatron.engines.api import EngineError
from igpo_megatron.types import Metric, RolloutGroup, RunStopped, ValuePoint


def disagreement(siblings: Sequence[float]) -> float:
    """Standard deviation (over n) of values from [0, 1], so 0 to 0.5; 0 for fewer than two values."""
    return pstdev(siblings) if len(siblings) > 1 else 0.0


def fork_probability(siblings: Sequence[float], config: GainBranching) -> float:
    """Chance of each fork for these values of the siblings: P = alpha + beta std(v), clipped to [0, 1]."""
    return min(max(config.base_probability + config.spread_weight * disagreement(siblings), 0.0), 1.0)


def largest_change(values: Sequence[float], turns: int) -> float | None:
    """max |v_k - v_(k-1)| over the last `turns` turns of a path; None if it has had fewer."""
    return max(abs(after - before) for before, after in pairwise(values[-turns - 1 :])) if len(values) > turns else None


def stop_probability(values: Sequence[float], config: GainBranching) -> float:
    """Chance that a path with values v_0 ... v_t stops: `config.stop_probability` if they are saturated, else 0.

    Saturated: v_t >= stop_value, and none of the last stop_turns turns has moved it by more than stop_change.
    """
    change = largest_change(values, config.stop_turns)
    saturated = change is not None and change <= config.stop_change and values[-1] >= config.stop_value
    return config.stop_probability if saturated else 0.0


@dataclass(slots=True)
class GainWatch(TurnWatch):
    """The tree's record of one path; `run_trajectory` calls it before every turn."""

    tree: GainTree
    number: int
    """Of the trajectory."""

    label: str
    values: dict[int, asyncio.Task[StateValue | None]] = field(default_factory=dict)
    """Number of finished turns -> value of the state behind them; None if it could not be measured."""

    ended: bool = False

    async def begins(self, path: Sequence[int], turn: int) -> bool:
        return await self.tree.begins(self, list(path), turn)


class GainTree(TreeRollout[GainWatch]):
    """Forks and stops paths as `rollout.branching.name=gain` says."""

    def __init__(
        self, group: RolloutGroup, config: GainBranching, samples: int, *, run_path: RunPath, uniform: Uniform, prober: Prober
    ) -> None:
        super().__init__(group, samples, run_path=run_path, uniform=uniform)
        self.config, self._prober = config, prober
        self._first: list[GainWatch] = []
        self._news = asyncio.Event()

    async def begins(self, watch: GainWatch, path: list[int], turn: int) -> bool:
        """Start to measure the newest state; behind a tool result decide whether to stop there and, later, whether to fork."""
        first = not watch.values
        watch.values[turn - 1] = asyncio.ensure_future(self._value(path[-1]))
        self._tell()
        # The first state of a path needs no decision: it is the question, or one that the forking path has decided on.
        if first:
            return False
        probability, change, stopped = await self._stop(watch, path, turn)
        self._background.append(asyncio.ensure_future(self._decide(watch, path, turn, change, probability, stopped)))
        return stopped

    async def _start(self) -> None:
        count = min(self.config.initial_rollouts, self._samples)
        self.group.metrics[Metric.INITIAL_ROLLOUTS] = float(count)
        self._first = [self._launch([0], str(number)) for number in range(count)]

    def _watch(self, number: int, label: str) -> GainWatch:
        return GainWatch(self, number, label)

    def _ended(self, watch: GainWatch) -> None:
        watch.ended = True
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _value(self, node: int) -> StateValue | None:
        try:
            return await self._prober.value(node)
        except EngineError:  # the path itself fails by it
            return None
        except RunStopped:
            raise
        except Exception:  # noqa: BLE001  (likewise: it waits for the same probes and reports their errors)
            return None

    async def _stop(self, watch: GainWatch, path: list[int], turn: int) -> tuple[float, float | None, bool]:
        """(probability, largest change of the path's last values, decision) of a stop before turn `turn`."""
        states = self._prober.states(path)[-self.config.stop_turns - 1 :]
        if not self.config.stop_probability or len(states) <= self.config.stop_turns:
            return 0.0, None, False
        values = _comparable([await self._prober.value(node) for node in states])
        probability = stop_probability(values, self.config)
        return probability, largest_change(values, self.config.stop_turns), self._uniform(watch.label, turn, "stop") < probability

    async def _decide(self, watch: GainWatch, path: list[int], turn: int, change: float | None, stop: float, stopped: bool) -> None:
        """Decide on a fork once the path's own value and those of the first samples at this turn are known; record both decisions."""
        finished = turn - 1
        while not all(sibling.ended or finished in sibling.values for sibling in self._first):
            await self._news.wait()
        own = await watch.values[finished]
        measured = [await sibling.values[finished] for sibling in self._first if finished in sibling.values]
        siblings = [value.value for value in measured if value is not None and own is not None and value.version == own.version]
        behind = self._behind(path)
        probability, children = None, []
        if own is not None and not stopped and self._free > 0:
            probability = fork_probability(siblings, self.config)
            wanted = [attempt for attempt in range(self.config.beam - 1) if self._uniform(watch.label, turn, attempt) < probability]
            children = self._fork(behind, watch.label, turn, wanted)
        self.group.value_points.append(
            ValuePoint(
                node=behind[-1],
                trajectory=watch.number,
                turn=turn,
                value=None if own is None else own.value,
                siblings=len(siblings),
                spread=disagreement(siblings),
                probability=probability,
                children=tuple(child.number for child in children),
                change=change,
                stop_probability=stop,
                stopped=stopped,
            )
        )


def _comparable(states: Sequence[StateValue | None]) -> list[float]:
    """The newest consecutive values measured by the same weights: across an update a change says nothing about the path."""
    newest = states[-1]
    same = takewhile(lambda state: state is not None and newest is not None and state.version == newest.version, reversed(states))
    return [state.value for state in same if state is not None][::-1]
