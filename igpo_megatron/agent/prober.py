"""Ground-truth probes scored by the engine during the rollout.

    tool returns ── state t ──┬── generate turn t + 1
                              └── score "answer" after state t      hidden under the decoding beside it

A probe is sent together with the turn that continues its state, to the same engine: whichever runs first fills the prefix cache for both.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from igpo_megatron.engines.api import Engine
from igpo_megatron.types import ProbeScore, RolloutGroup

RenderedProbe = tuple[str, list[int], tuple[int, int]]
"""(answer, token ids of the probe text, [start, stop) of the answer's tokens in them)."""


@dataclass(frozen=True, slots=True)
class StateValue:
    """How good a state is for answering."""

    value: float
    """exp(mean log-prob of the answer's tokens), from 0 to 1; the best over the probed aliases."""

    version: int
    """Version of the weights that measured it."""


class Prober:
    """Scores the states of one group, each (state, answer) once, however many samples pass through it."""

    def __init__(self, engine: Engine, group: RolloutGroup, probes: Sequence[RenderedProbe]) -> None:
        self._engine, self._group, self._probes = engine, group, probes
        self._tasks: dict[tuple[int, str], asyncio.Task[ProbeScore]] = {}

    def start(self, node: int) -> None:
        """Score all probes that continue node `node`; returns at once."""
        for answer, token_ids, (start, stop) in self._probes:
            if (node, answer) not in self._tasks:
                context = self._group.context(node)
                # Scored from the answer on, so the words before it, and a context of complete cache blocks, may come from the cache.
                scoring = self._engine.score_probe(context + token_ids[:stop], len(context) + start, key=self._group.prompt.id)
                self._tasks[node, answer] = asyncio.ensure_future(scoring)

    def states(self, path: Iterable[int]) -> list[int]:
        """The nodes of a path whose probes were started, in order."""
        answers = [answer for answer, _, _ in self._probes]
        return [node for node in path if any((node, answer) in self._tasks for answer in answers)]

    async def value(self, node: int) -> StateValue | None:
        """Wait for the probes of `node`; None if they are not finite or from different weights. Raises EngineError if one failed."""
        await self.collect([node])
        scores = [self._group.probe_scores[node, answer] for answer, _, _ in self._probes]
        values = [math.exp(fmean(score.logprobs)) for score in scores if all(map(math.isfinite, score.logprobs))]
        versions = {score.weight_version for score in scores}
        return StateValue(max(values), versions.pop()) if len(values) == len(scores) and len(versions) == 1 else None

    async def collect(self, nodes: Iterable[int]) -> None:
        """Wait for the probes of these nodes and write their scores to the group. Raises EngineError if one failed."""
        for node in nodes:
            for answer, _, _ in self._probes:
                if (node, answer) in self._tasks:
                    self._group.probe_scores[node, answer] = await asyncio.shield(self._tasks[node, answer])

    async def close(self) -> None:
        """Cancel unfinished probes, such as those of failed trajectories."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
