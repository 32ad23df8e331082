"""Node 0's side of the meeting: which nodes are present, whether the job starts, how it ends. Uses no sockets, and only its own clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from igpo_megatron.launch.messages import MAX_FLAGS, Answer, Kind, Report, Said, Verdict, clean_sentence
from igpo_megatron.launch.node import Node
from igpo_megatron.launch.preflight import Facts, missing

_SETTLE_S = 2.0
"""One fault causes many reports: the earliest cause is chosen this long after the first report."""

_SPARE_SEATS = 8
_CAUSES: tuple[Kind, ...] = ("interrupted", "ray", "signal", "error", "peer")


def earliest_cause(reports: Sequence[Report]) -> Report:
    """The report that names the cause. A killed process or a lost Ray makes others fail, not vice versa; among equals the earliest."""
    return min(reports, key=lambda report: (_CAUSES.index(report.kind), report.time))


def decide(
    reports: Sequence[Report], trainers: Collection[int], silent_s: Mapping[str, float], lost_after_s: float, since_first_s: float
) -> Verdict | None:
    """The verdict, None while the job goes on. `silent_s`: node's name -> seconds without a heartbeat; `since_first_s`: since a failure."""
    failed = [report for report in reports if report.kind != "done"]
    if failed:
        cause = earliest_cause(failed)
        # A killed launcher sends no report: its silence is the cause, and takes `lost_after_s` to be noticed.
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
    """State of one launcher."""

    facts: Facts
    heard: float
    report: Report | None = None
    left: bool = False
    told: bool = False
    """It has been answered why the job cannot start."""


class Head:
    """Takes all decisions. `hear` gets messages that doorway.py has already authenticated and parsed."""

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
        """Record a launcher's message and answer it. No message makes this raise, or reverses a decision."""
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
        seat.heard, seat.told = now, bool(self._stop)
        if self._starts:
            if seat.report is None and said.report is not None:
                seat.report = replace(said.report, rank=seat.facts.rank)  # a node reports only for itself
            seat.left |= said.left
            self._flags |= set(said.flags[: MAX_FLAGS - len(self._flags)])
        nodes_known = [_place(one.facts) for one in self._seats.values()] if self._starts and said.facts is not None else None
        return Answer(stop=self._stop, nodes=nodes_known, flags=sorted(self._flags), verdict=self._verdict)

    # ---- before the start

    @property
    def facts(self) -> list[Facts]:
        """Facts of all nodes that are present."""
        return [seat.facts for seat in self._seats.values()]

    @property
    def all_are_told(self) -> bool:
        """Whether every node that is present knows why the job cannot start."""
        return all(seat.told for seat in self._seats.values())

    def forget_silent(self, now: float) -> None:
        """Free the places of launchers that ended before the start."""
        self._seats = {key: seat for key, seat in self._seats.items() if now - seat.heard <= self._lost_after_s}

    def conclude(self, facts: list[Facts], problems: list[str], waited_s: float, *, overdue: bool, strangers: Collection[str]) -> None:
        """Start, stop, or keep waiting. `problems`: disagreements between `facts`, which may be out of date by now."""
        if facts != self.facts:
            return
        absent = missing(facts, self._node.nodes, waited_s)
        if absent and strangers:
            absent += f"; {', '.join(sorted(strangers))} asked and did not show that it has the same RAY_AUTH_TOKEN"
        # Waiting for more nodes does not resolve a disagreement.
        problems = problems if absent is None or len(facts) > 1 else []
        if problems or (absent and overdue):
            self._stop = clean_sentence("; ".join(problems or [absent or ""]))
        elif absent is None:
            self._starts = True

    # ---- after the start

    def look(self, now: float) -> bool:
        """Decide if possible; True when no other node is left to be informed."""
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
