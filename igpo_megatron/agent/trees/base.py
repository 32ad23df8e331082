"""A group that grows as a tree: every path is a task, paths may fork, and missing samples start at the question.

    prompt ─┬─ turn 1 ── result ─┬─ turn 2 ── ...      path 0
            │                    └─ turn 2' ── ...     path 8, a fork
            └─ turn 1' ── ...                          path 1

A path's samples and random decisions depend on its label alone ("3" is the fourth sample, "3.2.0" its first fork behind its second
result), so a resumed run repeats them. Only if more forks are wanted than the group has room for does their order in time matter. All
state is in one `TreeRollout` per group and ends with the step. entropy.py and gain.py decide when to fork.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from igpo_megatron.agent.trajectory import TurnWatch
from igpo_megatron.types import RolloutGroup, Trajectory

RunPath = Callable[[list[int], str, TurnWatch], Coroutine[Any, Any, Trajectory]]
"""(path to continue, label, observer of its turns) -> how the new path ended."""

Uniform = Callable[[str, int, "int | str"], float]
"""(label, turn, purpose) -> a number from [0, 1) that depends on nothing else."""

Watch = TypeVar("Watch", bound=TurnWatch)


class TreeRollout(ABC, Generic[Watch]):
    """Starts the paths of one group."""

    def __init__(self, group: RolloutGroup, samples: int, *, run_path: RunPath, uniform: Uniform) -> None:
        self.group = group
        self._samples, self._run_path, self._uniform = samples, run_path, uniform
        self._tasks: list[asyncio.Task[Trajectory]] = []
        self._background: list[asyncio.Task[None]] = []

    async def grow(self) -> list[Trajectory]:
        """All `samples` trajectories, in the order in which they were started."""
        try:
            await self._start()
            await self._all_ended()
            for _ in range(self._free):
                self._launch([0], f"late{len(self._tasks)}")
            await self._all_ended()
        except BaseException:
            unfinished = [*self._tasks, *self._background]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            raise
        return [task.result() for task in self._tasks]

    @abstractmethod
    async def _start(self) -> None:
        """Launch the samples that begin at the question."""

    @abstractmethod
    def _watch(self, number: int, label: str) -> Watch:
        """The observer of path `number`."""

    @abstractmethod
    def _ended(self, watch: Watch) -> None:
        """Called when a path has ended, for any reason."""

    @property
    def _free(self) -> int:
        return self._samples - len(self._tasks)

    def _launch(self, path: list[int], label: str) -> Watch:
        watch = self._watch(len(self._tasks), label)
        task = asyncio.ensure_future(self._run_path(path, label, watch))
        task.add_done_callback(lambda _: self._ended(watch))
        self._tasks.append(task)
        return watch

    def _fork(self, path: list[int], label: str, turn: int, attempts: Sequence[int]) -> list[Watch]:
        """Launch forks of path `label` before turn `turn`, as many as the group has room for."""
        return [self._launch(path, f"{label}.{turn - 1}.{attempt}") for attempt in attempts[: self._free]]

    def _behind(self, path: Sequence[int]) -> list[int]:
        """The path up to the tool result (or the prompt) that a turn continues: without the turn's forced opening."""
        return list(path[:-1] if self.group.nodes[path[-1]].kind == "forced" else path)

    async def _all_ended(self) -> None:
        """Wait until nothing runs, tasks started meanwhile included; errors are raised."""
        while running := [task for task in (*self._tasks, *self._background) if not task.done()]:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        for task in (*self._tasks, *self._background):  # also those that started and ended during a wait
            task.result()
