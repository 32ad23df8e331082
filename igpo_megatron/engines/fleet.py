"""The life cycle of engines: placed together, monitored, and restarted when they die.

    STARTING ──ready──> STALE ──weights, canary──> HEALTHY ──sync begins──> STALE
        ^                 │                           │
        └───restart─── DEAD <──────── lost ───────────┘          more than max_restarts: the run stops

Only HEALTHY engines get requests. One thread checks them; each start and restart has its own thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from igpo_megatron.config.schema import Config
from igpo_megatron.engines.actor import EngineActor, EngineLost, engine_environment, engine_options
from igpo_megatron.engines.api import EngineError, EnginesEnded
from igpo_megatron.engines.ray_cluster import RayCluster
from igpo_megatron.types import RunStopped
from igpo_megatron.weights.send import cause

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 20
_PLACE_TIMEOUT_S = 120
_LOOK_S = 1.0
_START_LOOK_S = 0.1


class EngineDied(EngineError):
    """The engine's process is gone; it may be restarted."""


class EngineState(StrEnum):
    """State of an engine."""

    STARTING = "starting"
    """Its process loads the model."""

    STALE = "stale"
    """It can serve, but its weights are not proven to be the newest."""

    HEALTHY = "healthy"
    """It serves the newest weights."""

    DEAD = "dead"
    """It is gone, and will be restarted if it has restarts left."""


@dataclass(eq=False, slots=True)
class Member:
    """One engine of the fleet."""

    number: int
    state: EngineState = EngineState.STARTING
    actor: Any = None
    process: int | None = None
    """Process id of its actor; None before it has answered."""

    is_local: bool = True
    """It runs on the main rank's machine."""

    restarts: int = 0


class Fleet:
    """All engines of a run."""

    def __init__(
        self,
        config: Config,
        cluster: RayCluster,
        weights: Path,
        *,
        cuda: bool,
        turns: Mapping[str, Any],
        fill: Callable[[Member], None],
    ) -> None:
        """`weights`: the file of later weights; `fill` makes a started engine HEALTHY, or raises EngineError or SyncError.

        `turns`: SamplingParams of every turn.
        """
        self._config, self._engine, self._cluster = config, config.rollout.engine, cluster
        self._cuda, self._turns, self._weights, self._fill = cuda, turns, weights, fill
        self.members = [Member(number) for number in range(self._engine.count)]
        self.problem: RunStopped | None = None
        """Why the run cannot go on."""

        self.changes = Changes()
        self._group: Any = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # ---- life

    def begin(self) -> None:
        """Place all engines and let them start; `wait` says when they serve. Raises RunStopped if Ray cannot place them."""
        import ray
        from ray.util.placement_group import placement_group

        bundle: dict[str, float] = {"CPU": 1, **({"GPU": self._engine.tensor} if self._cuda else {})}
        self._run(self._watch_ray, "Ray's health")
        self._group = placement_group([bundle] * self._engine.count, strategy="PACK")
        try:
            self._get(self._group.ready(), self._engine.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise EngineError(
                f"Ray could not place {self._engine.count} engines of {bundle} within {self._engine.start_timeout_s:g} s; "
                f"the cluster has {ray.cluster_resources()}"
            ) from None
        for member in self.members:
            self._run(partial(self._start, member, first=True), f"start of engine {member.number}")

    def wait(self) -> None:
        """Return when all engines serve; they are monitored from now on. Raises RunStopped naming the first that does not start."""
        while any(member.state is not EngineState.HEALTHY for member in self.members):
            if self.problem is not None:
                raise self.problem
            self._closing.wait(_START_LOOK_S)
        self._cluster.remember()
        self._run(self._watch, "engine health")

    def close(self) -> None:
        """End all engines."""
        import ray

        self._closing.set()
        self.stop(EnginesEnded("the engines were closed"))
        if ray.is_initialized() and not self._cluster.ended():
            stopping = [member.actor.stop.remote() for member in self.members if member.actor is not None]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_TIMEOUT_S) if stopping else None
            for member in self.members:
                if member.actor is not None:
                    ray.kill(member.actor)
            if self._group is not None:
                from ray.util.placement_group import remove_placement_group

                remove_placement_group(self._group)
        for thread in self._threads:
            thread.join(timeout=_STOP_TIMEOUT_S)

    def set_state(self, member: Member, state: EngineState) -> None:
        """Change a member's state and wake all waiters."""
        member.state = state
        self.changes.announce()

    def lost(self, member: Member, actor: Any, error: BaseException) -> None:
        """A member's `actor` is gone: restart the engine, or end the run if it has no restarts left."""
        with self._lock:
            if member.actor is not actor or member.state is EngineState.DEAD or self._closing.is_set() or self._ray_ended():
                return  # already handled, or it is not the engine that died
            if self.problem is not None:
                return  # the run ends: no engine is restarted
            member.state = EngineState.DEAD
            limit = self._engine.max_restarts
            where = f"engine {member.number} died ({cause(error)})"
            log = self._cluster.last_log_lines(member.process)
            if member.restarts >= limit:
                words = f"rollout.engine.max_restarts={limit} restart{'' if limit == 1 else 's'} of it have been used"
                self.stop(EnginesEnded(f"{where}, and {words}{log}"))
                self._end(actor)
            else:
                member.restarts += 1
                logger.warning("%s; restart %d of at most %d%s", where, member.restarts, limit, log)
                self._run(lambda: self._restart(member), f"restart of engine {member.number}")
        self.changes.announce()

    def stop(self, problem: RunStopped) -> None:
        """The run cannot go on: wake all waiters."""
        self.problem = self.problem or problem
        self.changes.announce()

    def wait_for(self, member: Member, reference: Any, what: str, timeout_s: float) -> Any:
        """The result of one call. If it fails, raises EngineError with the engine's name and the end of its log."""
        import ray

        try:
            return self._get(reference, timeout_s)
        except ray.exceptions.GetTimeoutError:
            log = self._cluster.last_log_lines(member.process)
            raise EngineError(f"engine {member.number} {what} within {timeout_s:g} s{log}") from None
        except (ray.exceptions.RayError, EngineLost) as error:
            log = self._cluster.last_log_lines(member.process)
            kind = EngineDied if is_lost(error) else EngineError
            raise kind(f"engine {member.number} {what}: {cause(error)}{log}") from None

    # ---- inside

    def _get(self, reference: Any, timeout_s: float) -> Any:
        """Like ray.get, but raises `problem` once the run cannot go on."""
        import ray

        deadline = time.monotonic() + timeout_s
        while self.problem is None:
            left = deadline - time.monotonic()
            ready, _ = ray.wait([reference], timeout=max(0.0, min(_LOOK_S, left)))
            if ready or left <= 0:
                return ray.get(reference, timeout=0 if left <= 0 else None)
        raise self.problem

    def _ray_ended(self) -> bool:
        ended = self._cluster.ended()
        if ended:
            self.stop(EnginesEnded(ended))
        return ended is not None

    def _watch_ray(self) -> None:
        while not self._closing.wait(_LOOK_S) and not self._ray_ended():
            if any(member.state is EngineState.STARTING for member in self.members):
                self._cluster.remember()  # Ray's agents start while the engines do

    def _place(self, member: Member) -> Any:
        """Give a member a new actor, which is returned."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = (
            ray.remote(EngineActor)
            .options(
                num_cpus=1,
                num_gpus=self._engine.tensor if self._cuda else 0,
                max_concurrency=4096,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=member.number),
                runtime_env={"env_vars": engine_environment(self._config, cuda=self._cuda)},
            )
            .remote(member.number)
        )
        # Together: a request that learns of the old actor's end only now would otherwise report another death.
        with self._lock:
            member.actor, member.process, member.state = actor, None, EngineState.STARTING
        return actor

    def _load(self, member: Member) -> Any:
        """Start to load the model in its actor; returns the reference to wait for."""
        member.process, node = self.wait_for(member, member.actor.place.remote(), "was not placed", _PLACE_TIMEOUT_S)
        member.is_local = self._is_here(member, node)
        shares_file = member.is_local and self._config.sync.transport != "object_store"
        options = engine_options(self._config, cuda=self._cuda, stop_strings=bool(self._turns["stop"]))
        return member.actor.start.remote(options, str(self._weights) if shares_file else None, self._turns)

    def _is_here(self, member: Member, node: str) -> bool:
        """True if a Ray node is that of the main rank."""
        import ray

        return node == ray.get_runtime_context().get_node_id()

    def _restart(self, member: Member) -> None:
        """Remove what is left of a dead engine, and start it again."""
        import ray

        dead = member.actor
        with contextlib.suppress(ray.exceptions.RayError, EngineLost):
            ray.wait([dead.stop.remote()], timeout=_STOP_TIMEOUT_S)
        self._end(dead)
        if not self._closing.is_set():
            self._start(member)

    def _start(self, member: Member, *, first: bool = False) -> None:
        """Bring a member from STARTING to HEALTHY, or to DEAD. If it refuses to start the `first` time, the run ends: it would again."""
        import ray

        try:
            actor = self._place(member)
        except ray.exceptions.RayError as error:
            self.stop(EnginesEnded(f"engine {member.number} could not be placed: {cause(error)}"))
            return
        try:
            self.wait_for(member, self._load(member), "did not start", self._engine.start_timeout_s)
            self.set_state(member, EngineState.STALE)
            self._fill(member)
        except EngineError as error:
            if first and not isinstance(error, EngineDied):
                self.stop(EnginesEnded(str(error)))
            else:
                self.lost(member, actor, error)
        except RunStopped as error:
            self.stop(error)

    def _end(self, actor: Any) -> None:
        """Kill an actor, and the calls in it that wait for a sync to end."""
        import ray

        ray.kill(actor)

    def _watch(self) -> None:
        while not self._closing.wait(self._engine.health_interval_s):
            asked = [member for member in self.members if member.state in (EngineState.HEALTHY, EngineState.STALE)]
            for member, actor in [(member, member.actor) for member in asked]:
                try:
                    self.wait_for(member, actor.check_health.remote(), "failed its health check", self._engine.health_timeout_s)
                except EngineError as error:
                    self.lost(member, actor, error)
                except RunStopped:
                    continue  # the run ends: no engine is restarted

    def _run(self, work: Callable[[], None], name: str) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # otherwise all waiters would wait for ever
                self.stop(EnginesEnded(f"{name} failed: {type(error).__name__}: {cause(error)}"))
                raise

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()


class Changes:
    """Lets coroutines on any event loop wait for the next change that another thread announces."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Future[None], asyncio.AbstractEventLoop] = {}

    def next(self) -> asyncio.Future[None]:
        """A future that ends with the next announcement. Get it before checking whether to wait, so that none is missed.

        Cancel it if nobody waits for it any more: thousands of requests are under way between two announcements.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            self._waiting[future] = loop
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: asyncio.Future[None]) -> None:
        with self._lock:
            self._waiting.pop(future, None)

    def announce(self) -> None:
        """Wake all waiters."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future, loop in waiting.items():
            with contextlib.suppress(RuntimeError):  # that loop was closed
                loop.call_soon_threadsafe(_done, future)


def is_lost(error: BaseException) -> bool:
    """True if the engine is gone, rather than wrong: its requests can go to another engine."""
    import ray

    # Ray's memory monitor ends an actor with an error of its own kind.
    return isinstance(error, (EngineLost, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError))


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
