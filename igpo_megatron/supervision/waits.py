"""Named waits: who waits for whom, since when, and a record when a wait takes too long.

    rank 1 ──"a broadcast from rank 0"──> rank 0 ──"the groups of step 3"──> the rollouts ──"turn 2 of ..."──> the engines
                                                           ──"a turn"──> engine 1

    with waiting("the groups of step 3", on=ROLLOUTS, deadline_s=1800): ...

A thread checks the waits once a second. A long one is posted in the run's folder, where other ranks' records include it. One that
passes its deadline writes a record, names the culprit in one sentence and ends the wait by an exception, or the process if the wait
cannot be interrupted. SIGUSR1 writes the record without ending anything.

    runs/NAME/waits/
        rank_0.json                  what this rank is waiting for, once that has taken some seconds
        record_rank_0_1.txt          the sentence, the graph of all ranks' waits, the stacks of this rank's threads
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import RunStopped

ROLLOUTS = "the rollouts"
"""The name under which trajectories wait; the main rank waits on it."""

ENGINES = "the engines"
"""The name under which requests wait, each on its own engine; trajectories wait on it."""

_LOOK_S = 1.0
_POSTED_AFTER_S = 5.0
_UNINTERRUPTED_S = 20.0
"""A process still in a wait this long after its deadline exits."""


class WaitExpired(RunStopped):
    """A wait passed its deadline."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One edge of the graph."""

    who: str
    """Who waits, e.g. `rank 0`."""

    what: str
    """What for, in words."""

    on: str
    """Who must act, e.g. `engine 1`; a name that may itself be the `who` of another wait."""

    since: float
    """Seconds since the epoch."""

    def sentence(self, now: float) -> str:
        return f"{self.who} has waited {now - self.since:.0f} s for {self.what} (from {self.on})"


def culprit(waits: Sequence[Wait], start: Wait) -> str:
    """Who keeps `start` waiting: the end of the chain of waits that begins there, or the circle in it."""
    chain = [start.who]
    on = start.on
    oldest = {wait.who: wait for wait in sorted(waits, key=attrgetter("since"), reverse=True)}
    while on not in chain:
        chain.append(on)
        if on not in oldest:
            return on
        on = oldest[on].on
    return f"a circle: {' waits for '.join([*chain[chain.index(on) :], on])}"


def oldest(waits: Iterable[Wait]) -> list[Wait]:
    """The longest wait of each pair (who, on): hundreds of requests make one edge."""
    edges: dict[tuple[str, str], Wait] = {}
    for wait in sorted(waits, key=attrgetter("since")):
        edges.setdefault((wait.who, wait.on), wait)
    return list(edges.values())


@dataclass(slots=True)
class _Open:
    wait: Wait
    began: float
    deadline_s: float | None
    thread: int
    sentence: str = ""
    """First line of the record, once the deadline has passed."""

    expired: WaitExpired | None = None
    """Still to be raised in the waiting thread."""


class Recorder:
    """The waits of one process. `open_recorder` makes it; a process without one waits unobserved."""

    def __init__(
        self,
        who: str,
        folder: Path,
        *,
        look_s: float = _LOOK_S,
        posted_after_s: float = _POSTED_AFTER_S,
        last_words: Callable[[WaitExpired], object] = lambda expired: None,
    ) -> None:
        """`last_words` is called before this process exits because an expired wait could not be interrupted."""
        self._last_words = last_words
        self._who, self._folder, self._look_s, self._posted_after_s = who, folder, look_s, posted_after_s
        self._file = who.replace(" ", "_")
        self._open: dict[int, _Open] = {}
        self._numbers, self._records = itertools.count(), itertools.count(1)
        self._closed = threading.Event()
        self._posted = False
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self, what: str, on: str, deadline_s: float | None = None, who: str | None = None) -> Iterator[None]:
        number = next(self._numbers)
        entry = _Open(Wait(who or self._who, what, on, time.time()), time.monotonic(), deadline_s, threading.get_ident())
        self._open[number] = entry
        try:
            yield
        finally:
            del self._open[number]
        if entry.expired is not None:  # the wait ended at the moment it expired
            raise entry.expired

    def record(self, start: Wait | None = None) -> str:
        """Write the record and return its sentence. `start`: the wait that expired; default: this process's oldest."""
        now = time.time()
        own = oldest([entry.wait for entry in list(self._open.values())])
        waits = [*own, *self._others()]
        start = start or min((wait for wait in own if wait.who == self._who), key=attrgetter("since"), default=None)
        idle = f"{self._who} waits for nobody"
        sentence = f"{start.sentence(now)}; held up by {culprit(waits, start)}" if start else idle
        path = self._folder / f"record_{self._file}_{next(self._records)}.txt"
        try:
            with whole(path) as part, part.open("w", encoding="utf-8") as file:
                file.write(f"{sentence}\n\nwho waits for whom:\n")
                file.writelines(f"  {wait.sentence(now)}\n" for wait in sorted(waits, key=attrgetter("since")))
                file.write("\nstacks of this process:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # a full disk must not end the thread that watches the deadlines
            return sentence
        return f"{sentence} (record: {path})"

    def interrupt(self) -> None:
        """Raise the error of the wait that expired on the main thread, from which this is called."""
        for entry in list(self._open.values()):
            if entry.expired is not None and entry.thread == threading.main_thread().ident:
                expired, entry.expired = entry.expired, None
                raise expired

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()
        self._thread.join()
        self._post([])

    def _look(self) -> None:
        while not self._closed.wait(self._look_s):
            now = time.monotonic()
            entries = list(self._open.values())
            self._post(oldest([entry.wait for entry in entries if now - entry.began > self._posted_after_s]))
            for entry in entries:
                if entry.deadline_s is None or now - entry.began < entry.deadline_s:
                    continue
                if not entry.sentence:
                    entry.sentence = self.record(entry.wait)
                    entry.expired = WaitExpired(entry.sentence)
                    sys.stderr.write(f"{entry.sentence}\n")
                    main = threading.main_thread().ident
                    if entry.thread == main and main is not None:
                        signal.pthread_kill(main, signal.SIGUSR2)
                elif now - entry.began > entry.deadline_s + _UNINTERRUPTED_S:
                    self._last_words(WaitExpired(entry.sentence))
                    os._exit(1)

    def _post(self, waits: list[Wait]) -> None:
        if not waits and not self._posted:
            return
        self._posted = bool(waits)
        path = self._folder / f"{self._file}.json"
        with contextlib.suppress(OSError):
            if not waits:
                path.unlink(missing_ok=True)
                return
            with whole(path) as part:
                part.write_text(json.dumps([asdict(wait) for wait in waits]), encoding="utf-8")

    def _others(self) -> list[Wait]:
        waits = []
        for path in sorted(self._folder.glob("*.json")):
            if path.name == f"{self._file}.json":
                continue
            with contextlib.suppress(OSError, ValueError):  # it is being replaced
                waits += [Wait(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        return waits


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording(who: str, folder: Path, last_words: Callable[[WaitExpired], object] = lambda expired: None) -> Iterator[Recorder]:
    """Observe this process's waits; `last_words` as in Recorder. Handles SIGUSR1 (write a record) and SIGUSR2 (end a wait): call it on
    the main thread."""
    global _recorder
    _recorder = recorder = Recorder(who, folder, last_words=last_words)
    before = {
        signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda number, frame: sys.stderr.write(f"{recorder.record()}\n")),
        signal.SIGUSR2: signal.signal(signal.SIGUSR2, lambda number, frame: recorder.interrupt()),
    }
    try:
        yield recorder
    finally:
        _recorder = None
        recorder.close()  # first: its thread may be about to send SIGUSR2, which would end the process
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def waiting(what: str, on: str, deadline_s: float | None = None, who: str | None = None) -> Iterator[None]:
    """Name a wait of `who`, by default this process. Raises WaitExpired once `deadline_s` have passed."""
    if _recorder is None:
        yield
        return
    with _recorder.waiting(what, on, deadline_s, who):
        yield
