"""Node 0's side of the meeting: who has come, whether the job starts, how it ends. Knows no sockets; times are its own clock's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from igpo_megatron.launch.messages import MAX_FLAGS, Answer, Kind, Report, Said, Verdict, clean_sentence
from igpo_megatron.launch.node import Node
from igpo_megatron.launch.preflight import Facts, missing

_SETTLE_S = 2.0
"""One fault makes many reports: this long after the first the earliest cause is chosen."""

_SPARE_SEATS = 8
_CAUSES: tuple[Kind, ...] = ("interrupted", "ray", "signal", "error", "peer")


def earliest_cause(reports: Sequence[Report]) -> Report:
    """The report that names the cause. A killed process or a lost Ray makes others fail, never the other way round; then the earliest."""
    return min(reports, key=lambda report: (_CAUSES.index(report.kind), report.time))


def decide(
    reports: Sequence[Report], trainers: Collection[int], silent_s: Mapping[str, float], lost_after_s: float, since_first_s: float
) -> Verdict | None:
    """The verdict, None while the job goes on. `silent_s`: node's name -> seconds without a heartbeat; `since_first_s`: since a failure."""
    failed = [report for report in reports if report.kind != "done"]
    if failed:
        cause = earliest_cause(failed)
        # Whose launcher was killed says nothing: its silence is the cause, and takes its time to be one.
        if since_first_s >= (lost_after_s + _SETTLE_S if cause.kind == "peer" else _SETTLE_S):
            return Verdict(cause.code, cause.sentence)
    lost = [f"{name} has not been heard of for {age:.0f} s: it is down or cut off" for name, age in silent_s.items() if age > lost_after_s]
    if lost:
        return Verdict(1, "; ".join(lost))
    if {report.rank for report in reports if report.kind == "done"} >= set(trainers):
        return Verdict(0, "finished")
    return None


@dataclass(slots=True)
class _Seat:
    """What one launcher has said."""

    facts: Facts
    heard: float
    report: Report | None = None
    left: bool = False


class Head:
    """The one place that decides. `hear` is given what came through the door (doorway.py), already proved and read."""

    def __init__(self, node: Node, *, lost_after_s: float) -> None:
        self._node, self._lost_after_s = node, lost_after_s
        self._seats: dict[str, _Seat] = {}
        """Launcher -> its seat."""

        self._flags: set[str] = set()
        self._starts = False
        self._stop = ""
        self._first_failure: float | None = None
        self._verdict: Verdict | None = None

    def hear(self, said: Said, now: float) -> Answer:
        """Note what a launcher says, and answer. Nothing it can say raises, or takes back what was decided."""
        seat = self._seats.get(said.launcher)
        if seat is None:
            if said.facts is None:
                return Answer(refused=f"{self._node.name} was started again and does not know this launcher")
            if said.facts.rank >= said.facts.nodes:
                return Answer(refused=f"{said.facts.name} is not one of its own {said.facts.nodes} nodes")
            if self._starts or len(self._seats) >= 2 * self._node.nodes + _SPARE_SEATS:
                nodes = self._node.nodes
                return Answer(refused=f"the job at {self._node.head}:{self._node.port} already has its {nodes} nodes")
            seat = self._seats[said.launcher] = _Seat(said.facts, now)
        seat.heard = now
        if self._starts:
            if seat.report is None and said.report is not None:
                seat.report = replace(said.report, rank=seat.facts.rank)  # nobody reports for another
            seat.left |= said.left
            self._flags |= set(said.flags[: MAX_FLAGS - len(self._flags)])
        nodes_known = [_place(one.facts) for one in self._seats.values()] if self._starts and said.facts is not None else None
        return Answer(stop=self._stop, nodes=nodes_known, flags=sorted(self._flags), verdict=self._verdict)

    # ---- before the start

    @property
    def facts(self) -> list[Facts]:
        """Of those who are here."""
        return [seat.facts for seat in self._seats.values()]

    def forget_silent(self, now: float) -> None:
        """A launcher that came and ended before the start frees its place."""
        self._seats = {key: seat for key, seat in self._seats.items() if now - seat.heard <= self._lost_after_s}

    def conclude(self, facts: list[Facts], problems: list[str], waited_s: float, *, overdue: bool, strangers: Collection[str]) -> None:
        """Let all start, or stop, or wait on. `problems`: what is wrong between `facts`, who may not be all any more."""
        if facts != self.facts:
            return
        absent = missing(facts, self._node.nodes, waited_s)
        if absent and strangers:
            absent += f"; {', '.join(sorted(strangers))} asked and did not show that it has the same RAY_AUTH_TOKEN"
        # What is wrong already will not become right by waiting for more nodes.
        problems = problems if absent is None or len(facts) > 1 else []
        if problems or (absent and overdue):
            self._stop = clean_sentence("; ".join(problems or [absent or ""]))
        elif absent is None:
            self._starts = True

    # ---- after the start

    def look(self, now: float) -> bool:
        """Decide when there is something to decide; True when no other node is left to hear of it."""
        silent = {seat.facts.name: now - seat.heard for seat in self._seats.values()}
        if self._verdict is None:
            reports = [seat.report for seat in self._seats.values() if seat.report]
            if self._first_failure is None and any(report.kind != "done" for report in reports):
                self._first_failure = now
            since = now - self._first_failure if self._first_failure is not None else 0.0
            trainers = {seat.facts.rank for seat in self._seats.values() if seat.facts.ranks}
            verdict = decide(reports, trainers, silent, self._lost_after_s, since)
            self._verdict = verdict and Verdict(verdict.code, clean_sentence(verdict.sentence))
        return all(seat.left or now - seat.heard > self._lost_after_s for seat in self._seats.values())


def _place(facts: Facts) -> Facts:
    """What other nodes need to know of one."""
    return replace(facts, packages={}, config={}, options={}, model="", busy=[])
