"""Injected faults: a search client whose searches are slow or fail by a seeded plan."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus
from igpo_megatron.search.settings import Chaos

FAULTS = (SearchStatus.ERROR, SearchStatus.TIMEOUT, SearchStatus.RATE_LIMITED)


class ChaosClient:
    """SearchClient around another one. It wraps the cache, so cached queries can fail too and no fault is stored."""

    def __init__(self, inner: SearchClient, config: Chaos):
        self.inner = inner
        self.config = config
        self._asked: Counter[str] = Counter()

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query, some of them failed; the call takes the longest of the added latencies."""
        start = time.perf_counter()
        plans = [self._plan(query) for query in queries]
        await asyncio.sleep(max((latency_s for _, latency_s in plans), default=0.0))
        wanted = [query for query, (fault, _) in zip(queries, plans, strict=True) if fault is None]
        answers = iter(await self.inner.search(wanted) if wanted else [])
        results = [
            next(answers) if fault is None else SearchResult(query, fault, "chaos", error="injected by search.mode=chaos")
            for query, (fault, _) in zip(queries, plans, strict=True)
        ]
        took = time.perf_counter() - start
        return [replace(result, latency_s=took) for result in results]

    async def close(self) -> None:
        """Close the other client."""
        await self.inner.close()

    def _plan(self, query: str) -> tuple[SearchStatus | None, float]:
        """(fault if any, added seconds) for the next time a query is asked. Other queries in between do not matter."""
        number = self._asked[query]
        self._asked[query] += 1
        draw = random.Random(f"{self.config.seed}|{number}|{query}")
        fault = draw.choice(FAULTS) if draw.random() < self.config.failed_fraction else None
        return fault, added_latency(self.config, draw)


def added_latency(config: Chaos, draw: random.Random) -> float:
    """A random time in seconds with mean `latency_s`."""
    if not config.latency_s:
        return 0.0
    if config.latency_sigma is None:
        return draw.expovariate(1 / config.latency_s)
    return draw.lognormvariate(math.log(config.latency_s) - config.latency_sigma**2 / 2, config.latency_sigma)
