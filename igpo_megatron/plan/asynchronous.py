"""Discrete-event simulation of a run: engines decode, tools answer, and the trainer follows in order, with bounded staleness.

    batch s starts   when the weights of step s - 1 - k are installed (and batch s - 1 has started)
    training s starts when batch s has ended and step s - 1 is done;  its weights are installed `install` seconds after it ends

Where every rollout takes R and every training T (engines without limit), a step takes exactly max(T, (R + T) / (k + 1)).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

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

    decoding: list[tuple[float, int, int]] = field(default_factory=list)
    """(token clock at the turn's end, order, trajectory)"""

    queue: list[int] = field(default_factory=list)
    """Trajectories that wait for a place, the next one at the end."""

    inside: int = 0
    tokens: float = 0.0
    since: float = 0.0
    """Time at which `tokens` was right."""

    busy: float = 0.0
    epoch: int = 0
    """Counts changes of what is decoded: an event of an earlier epoch is void."""


class Simulation:
    """Runs a Setup, by `run`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now = 0.0
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = count()
        self.engines = [_Engine() for _ in range(setup.engines)]
        self.trajectories: list[Draw] = []
        self.batch_of: list[int] = []
        self.turn: list[int] = []
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
            self.now, _, kind, which, epoch = heapq.heappop(self.events)
            if kind == "turn":
                if self.engines[which].epoch == epoch:
                    self._turn_ends(which)
            elif kind == "tool":
                self._decode(engine=epoch, trajectory=which)
            elif kind == "trained":
                self._training_ends()
            else:
                self.version = max(self.version, which)
                self._start_batches()
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

    def _at(self, when: float, kind: str, which: int, epoch: int = 0) -> None:
        heapq.heappush(self.events, (when, next(self.order), kind, which, epoch))

    def _start_batches(self) -> None:
        while self.started < self.setup.steps and self.version >= self.started - self.setup.staleness:
            self.started += 1
            batch = self.setup.batches(self.started)
            self.left[self.started], self.ages[self.started] = len(batch), []
            for number, one in enumerate(batch):
                self.trajectories.append(one)
                self.batch_of.append(self.started)
                self.turn.append(0)
                self.engines[number % len(self.engines)].queue.insert(0, len(self.trajectories) - 1)
            for number in range(len(self.engines)):
                self._admit(number)

    def _admit(self, engine: int) -> None:
        here = self.engines[engine]
        while here.queue and here.inside < self.setup.concurrent:
            here.inside += 1
            self._decode(engine, here.queue.pop())

    def _decode(self, engine: int, trajectory: int) -> None:
        """The trajectory begins its next turn."""
        here = self.engines[engine]
        self._advance(here)
        step = self.batch_of[trajectory]
        self.ages[step].append(max(0, step - 1 - self.version))
        length = self.trajectories[trajectory].sampled[self.turn[trajectory]]
        heapq.heappush(here.decoding, (here.tokens + length, next(self.order), trajectory))
        self._schedule(engine)

    def _advance(self, here: _Engine) -> None:
        if here.decoding:
            here.tokens += (self.now - here.since) / self.setup.pace(len(here.decoding))
            here.busy += self.now - here.since
        here.since = self.now

    def _schedule(self, engine: int) -> None:
        here = self.engines[engine]
        here.epoch += 1
        if here.decoding:
            left = max(0.0, here.decoding[0][0] - here.tokens)
            self._at(self.now + left * self.setup.pace(len(here.decoding)), "turn", engine, here.epoch)

    def _turn_ends(self, engine: int) -> None:
        here = self.engines[engine]
        self._advance(here)
        here.tokens, _, trajectory = heapq.heappop(here.decoding)
        one, turn = self.trajectories[trajectory], self.turn[trajectory]
        if turn < len(one.observed):
            self.turn[trajectory] += 1
            self._at(self.now + one.waits[turn], "tool", trajectory, engine)
        else:
            here.inside -= 1
            self.finished.append(self.now)
            step = self.batch_of[trajectory]
            self.left[step] -= 1
            self._admit(engine)
            self._start_training()
        self._schedule(engine)

    def _start_training(self) -> None:
        if not self.training and self.left.get(self.trained + 1) == 0:
            self.training = True
            self._at(self.now + self.setup.train, "trained", 0)

    def _training_ends(self) -> None:
        self.trained += 1
        self.training = False
        self.ends.append(self.now)
        self.busy_at_end.append(sum(here.busy for here in self.engines))
        self._at(self.now + self.setup.install, "installed", self.trained)
        self._start_training()
