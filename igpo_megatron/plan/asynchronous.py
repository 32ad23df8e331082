"""Discrete-event simulation of a run: engines decode, tools answer, and the trainer follows in order, with bounded staleness.

    batch s starts   when the weights of step s - 1 - k are installed (and batch s - 1 has started)
    training s starts when batch s has ended and step s - 1 is done;  its weights are installed `install` seconds after it ends

Where every rollout takes R and every training T (engines without limit), a step takes exactly max(T, (R + T) / (k + 1)).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle

from igpo_megatron.plan.workload import Draw


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated."""

    batches: Callable[[int], Sequence[Draw]]
    """Trajectories of step s, from 1."""

    engines: int
    concurrent: int
    """Trajectories on one engine at most; those that wait for a tool keep their place."""

    pace: Callable[[int], float]
    """Seconds of a decoding step of so many trajectories."""

    train: float
    """Seconds of scoring and training a batch."""

    install: float
    """Seconds from the end of training until the engines sample with the new weights."""

    staleness: int
    steps: int
    warm_up: int
    """Steps at the beginning that are left out of all figures."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the steps after the warm-up."""

    step: float
    """Seconds from one update to the next."""

    engine_use: float
    """Share of the time in which an engine decodes anything."""

    trainer_use: float
    staleness: float
    """Updates between the weights that sampled a turn and those that are trained, mean over turns."""

    largest_staleness: int


@dataclass(slots=True)
class _Engine:
    """One engine on a clock of tokens. When the number of decoding trajectories changes, only the rate of the clock changes, not the
    remaining lengths."""

    decoding: list[tuple[float, int, _Trajectory]] = field(default_factory=list)
    """A heap of (token clock at the turn's end, order, trajectory)."""

    queue: deque[_Trajectory] = field(default_factory=deque)
    """Trajectories that wait for a place."""

    inside: int = 0
    tokens: float = 0.0
    since: float = 0.0
    """Time at which `tokens` was right."""

    busy: float = 0.0
    epoch: int = 0
    """Counts changes of what is decoded: the end of a turn that was foreseen in an earlier epoch is void."""


@dataclass(slots=True)
class _Trajectory:
    draw: Draw
    step: int
    engine: _Engine
    turn: int = 0


class Simulation:
    """Runs a Setup, by `run`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        """A heap of (time, order, what happens then)."""

        self.order = count()
        self.engines = [_Engine() for _ in range(setup.engines)]
        self.left: dict[int, int] = {}
        """Batch -> trajectories that still run."""

        self.version = 0
        """Newest installed weights; step s makes version s."""

        self.started, self.trained, self.training = 0, 0, False
        self.ends: list[float] = [0.0]
        self.busy_at_end: list[float] = [0.0]
        self.ages: dict[int, list[int]] = {}
        self.finished: list[float] = []
        """When each trajectory ended, in order."""

    def run(self) -> Outcome:
        """Simulate all steps."""
        self._start_batches()
        while self.trained < self.setup.steps:
            self.now, _, happen = heapq.heappop(self.events)
            happen()
        first = self.setup.warm_up
        span = self.ends[-1] - self.ends[first]
        steps = len(self.ends) - 1 - first
        ages = [age for step in range(first + 1, len(self.ends)) for age in self.ages[step]]
        return Outcome(
            step=span / steps,
            engine_use=(self.busy_at_end[-1] - self.busy_at_end[first]) / span / len(self.engines),
            trainer_use=self.setup.train * steps / span,
            staleness=sum(ages) / len(ages),
            largest_staleness=max(ages),
        )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), happen))

    def _start_batches(self) -> None:
        while self.started < self.setup.steps and self.version >= self.started - self.setup.staleness:
            self.started += 1
            batch = self.setup.batches(self.started)
            self.left[self.started], self.ages[self.started] = len(batch), []
            for draw, engine in zip(batch, cycle(self.engines)):
                engine.queue.append(_Trajectory(draw, self.started, engine))
            for engine in self.engines:
                self._admit(engine)

    def _admit(self, engine: _Engine) -> None:
        while engine.queue and engine.inside < self.setup.concurrent:
            engine.inside += 1
            self._decode(engine.queue.popleft())

    def _decode(self, one: _Trajectory) -> None:
        """The trajectory begins its next turn."""
        engine = one.engine
        self._advance(engine)
        self.ages[one.step].append(max(0, one.step - 1 - self.version))
        heapq.heappush(engine.decoding, (engine.tokens + one.draw.sampled[one.turn], next(self.order), one))
        self._schedule(engine)

    def _advance(self, engine: _Engine) -> None:
        if engine.decoding:
            engine.tokens += (self.now - engine.since) / self.setup.pace(len(engine.decoding))
            engine.busy += self.now - engine.since
        engine.since = self.now

    def _schedule(self, engine: _Engine) -> None:
        engine.epoch += 1
        if engine.decoding:
            left = max(0.0, engine.decoding[0][0] - engine.tokens)
            self._at(self.now + left * self.setup.pace(len(engine.decoding)), partial(self._turn_ends, engine, engine.epoch))

    def _turn_ends(self, engine: _Engine, epoch: int) -> None:
        if engine.epoch != epoch:
            return
        self._advance(engine)
        engine.tokens, _, one = heapq.heappop(engine.decoding)
        if one.turn < len(one.draw.observed):
            self._at(self.now + one.draw.waits[one.turn], partial(self._decode, one))
            one.turn += 1
        else:
            engine.inside -= 1
            self.finished.append(self.now)
            self.left[one.step] -= 1
            self._admit(engine)
            self._start_training()
        self._schedule(engine)

    def _start_training(self) -> None:
        if not self.training and self.left.get(self.trained + 1) == 0:
            self.training = True
            self._at(self.now + self.setup.train, self._training_ends)

    def _training_ends(self) -> None:
        self.trained += 1
        self.training = False
        self.ends.append(self.now)
        self.busy_at_end.append(sum(engine.busy for engine in self.engines))
        self._at(self.now + self.setup.install, partial(self._install, self.trained))
        self._start_training()

    def _install(self, version: int) -> None:
        self.version = max(self.version, version)
        self._start_batches()
