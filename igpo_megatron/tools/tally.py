"""Counts how a step's tool calls end: for the metrics, and to name a provider that fails too often.

tool ──TallyTool──> Tally of that tool ──metrics──> {"search/ok": 61.0, "search/p95_s": 0.4, "visit/calls": 7.0, ...}
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from igpo_megatron.search.results import SearchResult, SearchStatus
from igpo_megatron.tools.base import Observed, Tool
from igpo_megatron.types import SEARCH, of_tool


@dataclass(slots=True)
class Tally:
    """How the calls of one tool ended; for search, every query is a call."""

    status: Counter[str] = field(default_factory=Counter)
    """Status -> calls."""

    latencies_s: list[float] = field(default_factory=list)
    """Of calls that the cache did not answer."""

    cached: int = 0
    """Calls that the cache, or the record of a replay, answered."""

    failures: Counter[str] = field(default_factory=Counter)
    """Failure as one sentence, `provider: status: error` -> count."""

    @property
    def calls(self) -> int:
        return self.status.total()

    def add(self, status: str, latency_s: float, *, cached: bool, failure: str | None) -> None:
        """Count one call."""
        self.status[status] += 1
        self.cached += cached
        if not cached:
            self.latencies_s.append(latency_s)
        if failure is not None:
            self.failures[failure] += 1

    def metrics(self, tool: str) -> dict[str, float]:
        """`tool/calls`, `tool/cached`, `tool/STATUS` and, if times were measured, `tool/p50_s` and `tool/p95_s`."""
        counts = {"calls": self.calls, "cached": self.cached, **self.status}
        times = {"p50_s": percentile(self.latencies_s, 50), "p95_s": percentile(self.latencies_s, 95)} if self.latencies_s else {}
        return {of_tool(tool, name): float(value) for name, value in (counts | times).items()}


def tally_metrics(tallies: Mapping[str, Tally]) -> dict[str, float]:
    """Tallies as flat numbers: `search/ok`, `search/p95_s`, `visit/calls`, ..."""
    return {name: value for tool, tally in tallies.items() for name, value in tally.metrics(tool).items()}


def new_tallies(tools: Iterable[str]) -> dict[str, Tally]:
    """A tally for each tool. Every status of a search is reported, also with count 0."""
    statuses = [status.value for status in SearchStatus]
    return {tool: Tally(Counter(dict.fromkeys(statuses if tool == SEARCH else (), 0))) for tool in tools}


def percentile(values: Sequence[float], percent: int) -> float:
    """`percentile([1, 2, 3, 4], 50) == 2.5`: it interpolates between neighbours."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


class TallyTool:
    """Tool that counts the calls of another one, which it does not own."""

    def __init__(self, inner: Tool, tally: Tally):
        self.inner, self.tally = inner, tally

    async def use(self, arguments: Sequence[str]) -> Observed:
        """The other tool's result."""
        start = time.perf_counter()
        observed = await self.inner.use(arguments)
        for result in observed.results:
            failure = None if result.status.is_answer else why_failed(result)
            self.tally.add(result.status.value, result.latency_s, cached=result.cached, failure=failure)
        if not observed.results:
            self.tally.add(observed.status, time.perf_counter() - start, cached=observed.cached, failure=observed.failure)
        return observed

    async def close(self) -> None:
        """The other tool stays open."""


def why_failed(result: SearchResult) -> str:
    """`serper: timeout: https://google.serper.dev/search: no answer within 30 s`"""
    return f"{result.provider}: {result.status}: {result.error}"
