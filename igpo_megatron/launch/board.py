"""The store on node 0 through which nodes talk: facts before the start, heartbeats and reports after it, one verdict at the end.

A thread does all of a node's talking, so a cut link blocks that thread and never the node. Times are each node's own: nothing here
compares the clocks of two machines, except the order of reports of one kind.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from igpo_megatron.launch.node import Node
from igpo_megatron.launch.preflight import Facts, busy_port, missing
from igpo_megatron.types import UserError

Kind = Literal["done", "interrupted", "ray", "signal", "error", "peer"]
"""`peer`: a rank lost its connection to another one, which is never the cause."""

_POLL_S = 0.2
_SETTLE_S = 2.0
"""One fault makes many reports: this long after the first the earliest cause is chosen."""

_LEAVE_S = 20.0
_HEAD_SPARES_S = 5.0  # what node 0 says must reach the others before their deadline is over
_CAUSES: tuple[Kind, ...] = ("interrupted", "ray", "signal", "error", "peer")


class PreflightFailed(UserError):
    """The job cannot start; the message is the sentence that every node prints."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a node's part ended."""

    rank: int
    kind: Kind
    sentence: str
    code: int
    time: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the job ended, for every node alike."""

    code: int
    sentence: str


def culprit(reports: Sequence[Report]) -> Report:
    """The report that names the cause. A killed process or a lost Ray makes others fail, never the other way round; then the earliest."""
    return min(reports, key=lambda report: (_CAUSES.index(report.kind), report.time))


def decide(
    reports: Sequence[Report], trainers: Collection[int], silent_s: Mapping[str, float], lost_after_s: float, since_first_s: float
) -> Verdict | None:
    """The verdict, None while the job goes on. `silent_s`: node's name -> seconds without a heartbeat; `since_first_s`: since a failure."""
    failed = [report for report in reports if report.kind != "done"]
    if failed:
        cause = culprit(failed)
        # Whose launcher was killed says nothing: its silence is the cause, and takes its time to be one.
        if since_first_s >= (lost_after_s + _SETTLE_S if cause.kind == "peer" else _SETTLE_S):
            return Verdict(cause.code, cause.sentence)
    lost = [f"{name} has not been heard of for {age:.0f} s: it is down or cut off" for name, age in silent_s.items() if age > lost_after_s]
    if lost:
        return Verdict(1, "; ".join(lost))
    if {report.rank for report in reports if report.kind == "done"} >= set(trainers):
        return Verdict(0, "finished")
    return None


class Board:
    """One node's place at the store. Raises PreflightFailed where node 0 cannot hold it."""

    def __init__(self, node: Node, *, lost_after_s: float) -> None:
        self.node, self._lost_after_s = node, lost_after_s
        self._store: Any = None
        self._facts: list[Facts] = []
        self._verdict: Verdict | None = None
        self._outbox: dict[str, str] = {}
        self._reported = False
        self._wanted: set[str] = set()
        self._posted: set[str] = set()
        self._heard = time.monotonic()
        self._ended = threading.Event()

    def meet(self, own: Facts, deadline_s: float, judge: Callable[[list[Facts]], list[str]]) -> list[Facts]:
        """Wait for every node, at most `deadline_s`; the facts of all, or PreflightFailed with the same sentence on every node."""
        answer: Future[list[Facts]] = Future()

        def exchange() -> None:
            try:
                answer.set_result(self._exchange(own, time.monotonic() + deadline_s, deadline_s, judge))
            except (PreflightFailed, RuntimeError) as problem:
                answer.set_exception(problem)

        threading.Thread(target=exchange, daemon=True).start()
        try:
            self._facts = answer.result(deadline_s + 1)
        except TimeoutError:
            raise PreflightFailed(self._no_answer(deadline_s)) from None
        self._heard = time.monotonic()
        threading.Thread(target=self._talk, daemon=True).start()
        return self._facts

    def _no_answer(self, deadline_s: float) -> str:
        return (
            f"no `igpo launch` of node 0 answered at {self.node.head}:{self.node.port} within {deadline_s:g} s: start it there, open the "
            "firewall between the nodes, or, if something else listens on that port, give every node another --head port"
        )

    def _exchange(self, own: Facts, until: float, deadline_s: float, judge: Callable[[list[Facts]], list[str]]) -> list[Facts]:
        self._store = store = self._open(deadline_s)
        seat = store.add("seats", 1) - 1
        store.set(f"facts/{seat}", own.to_json())
        if self.node.is_head:
            self._decide_start(store, until - min(_HEAD_SPARES_S, deadline_s / 2), deadline_s, judge)
        while time.monotonic() < until:
            if store.check(["stop"]):
                raise PreflightFailed(json.loads(store.get("stop"))["sentence"])
            if store.check(["go"]):
                facts = [Facts.from_json(text) for text in json.loads(store.get("go"))]
                if own not in facts:
                    raise PreflightFailed(f"the job at {self.node.head}:{self.node.port} already has its {len(facts)} nodes")
                return facts
            time.sleep(_POLL_S)
        raise PreflightFailed(self._no_answer(deadline_s))

    def _open(self, deadline_s: float) -> Any:
        import torch.distributed as dist

        timeout = timedelta(seconds=deadline_s)
        if not self.node.is_head:
            try:
                return dist.TCPStore(self.node.head, self.node.port, is_master=False, timeout=timeout, wait_for_workers=False)
            except (dist.DistError, RuntimeError, ValueError):
                raise PreflightFailed(self._no_answer(deadline_s)) from None
        try:
            # Our own socket: left to itself torch listens on every interface.
            listener = socket.create_server((self.node.address, self.node.port), backlog=1024)
        except OSError:
            raise PreflightFailed(busy_port(self.node.port, self.node.name)) from None
        place = self.node.address, self.node.port
        return dist.TCPStore(*place, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())

    def _decide_start(self, store: Any, until: float, deadline_s: float, judge: Callable[[list[Facts]], list[str]]) -> None:
        """Node 0: collect the facts, then let all start or stop."""
        while True:
            facts = [Facts.from_json(store.get(f"facts/{seat}")) for seat in range(store.add("seats", 0)) if store.check([f"facts/{seat}"])]
            absent = missing(facts, self.node.nodes, deadline_s)
            # What is wrong already will not become right by waiting for more nodes.
            problems = judge(facts) if absent is None else [one for one in judge(facts) if len(facts) > 1]
            if problems or absent is None or time.monotonic() > until:
                break
            time.sleep(_POLL_S)
        problems = problems or ([absent] if absent else [])
        if problems:
            store.set("stop", json.dumps({"code": 2, "sentence": "; ".join(problems)}))
            time.sleep(5 * _POLL_S)  # the others read it before this process, and the store with it, ends
        else:
            store.set("go", json.dumps([one.to_json() for one in facts]))

    # ---- after the start

    @property
    def verdict(self) -> Verdict | None:
        """How the job ended; None while it goes on. A node that node 0 no longer answers decides for itself."""
        silent = time.monotonic() - self._heard
        if self._verdict is None and not self.node.is_head and silent > self._lost_after_s:
            head = next(one.name for one in self._facts if one.rank == 0)
            self._verdict = Verdict(1, f"{head} has not answered {self.node.name} for {silent:.0f} s: one of them is down or cut off")
        return self._verdict

    def report(self, kind: Kind, sentence: str, code: int) -> None:
        """Say once how this node's part ended."""
        report = Report(self.node.rank, kind, sentence, code, time.time())
        if not self._reported:
            self._reported = True
            self._outbox[f"report/{self.node.rank}"] = json.dumps(asdict(report))

    def post(self, flag: str) -> None:
        """Tell every node that something is ready."""
        self._outbox[f"flag/{flag}"] = ""

    def has(self, flag: str) -> bool:
        """Some node has posted it. Known within a few polls."""
        self._wanted.add(flag)
        return flag in self._posted

    def leave(self) -> None:
        """Say that this node has stopped; node 0 stays until all others did, or are lost."""
        self._outbox["left/" + str(self.node.rank)] = ""
        until = time.monotonic() + (_LEAVE_S if self.node.is_head else 2.0)
        while time.monotonic() < until and not self._ended.is_set():
            time.sleep(_POLL_S)

    def _talk(self) -> None:
        """The thread: heartbeat, outbox, flags, verdict; on node 0 also the decision."""
        watch = _Watch(self._facts, self._lost_after_s)
        self._store.set_timeout(timedelta(seconds=max(1.0, self._lost_after_s)))
        beats = itertools.count()
        while not self._ended.is_set():
            try:
                self._store.set(f"beat/{self.node.rank}", str(next(beats)))
                for key, text in list(self._outbox.items()):
                    self._store.set(key, text)
                    del self._outbox[key]
                    if key.startswith("left/") and not self.node.is_head:
                        self._ended.set()
                self._posted |= {flag for flag in self._wanted - self._posted if self._store.check([f"flag/{flag}"])}
                if self.node.is_head and watch.look(self._store):
                    self._ended.set()
                if self._verdict is None and self._store.check(["verdict"]):
                    self._verdict = Verdict(**json.loads(self._store.get("verdict")))
                self._heard = time.monotonic()
            except RuntimeError:  # node 0 ended, or the link did: `verdict` says so once it has lasted
                pass
            time.sleep(_POLL_S)


class _Watch:
    """Node 0's eye on all nodes."""

    def __init__(self, facts: Sequence[Facts], lost_after_s: float) -> None:
        self._names = {one.rank: one.name for one in facts}
        self._trainers = {one.rank for one in facts if one.ranks}
        self._lost_after_s = lost_after_s
        self._beats = {rank: (b"", time.monotonic()) for rank in self._names}
        """Node -> its last heartbeat, and when it came by this machine's clock."""

        self._first_failure: float | None = None
        self._decided = False

    def look(self, store: Any) -> bool:
        """Write the verdict when there is one; True when no other node is left to read it."""
        now = time.monotonic()
        for rank, (old, _) in self._beats.items():
            beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
            if beat != old:
                self._beats[rank] = (beat, now)
        silent = {rank: now - at for rank, (_, at) in self._beats.items()}
        if not self._decided:
            reports = [Report(**json.loads(store.get(f"report/{rank}"))) for rank in self._names if store.check([f"report/{rank}"])]
            if self._first_failure is None and any(report.kind != "done" for report in reports):
                self._first_failure = now
            since = now - self._first_failure if self._first_failure is not None else 0.0
            named_silent = {self._names[rank]: age for rank, age in silent.items()}
            verdict = decide(reports, self._trainers, named_silent, self._lost_after_s, since)
            if verdict is not None:
                store.set("verdict", json.dumps(asdict(verdict)))
                self._decided = True
        return all(age > self._lost_after_s or store.check([f"left/{rank}"]) for rank, age in silent.items())
