"""Counting how searches end, so that a provider that fails too often can be named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from igpo_megatron.search.results import SearchClient, SearchResult


class TallyClient:
    """SearchClient that counts what another one gives back; it does not own it."""

    def __init__(self, inner: SearchClient):
        self.inner = inner
        self.searches = 0
        """Queries answered or failed so far."""

        self.failures: Counter[str] = Counter()
        """One sentence about a failure, `provider: status: error` -> how often."""

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """The other client's results."""
        results = await self.inner.search(queries)
        self.searches += len(results)
        self.failures.update(why_failed(result) for result in results if not result.status.is_answer)
        return results

    async def close(self) -> None:
        """The other client stays open."""


def why_failed(result: SearchResult) -> str:
    """`serper: timeout: https://google.serper.dev/search: no answer within 30 s`"""
    return f"{result.provider}: {result.status}: {result.error}"
