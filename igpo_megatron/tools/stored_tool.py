"""A tool behind the store of searches: its results are cached (live), kept for good (record) or read back (replay).

arguments ──as JSON: the query──> cache.py's clients ──miss──> the tool ──Observed as the only passage──> store

To the store a call is a query to a back-end with the tool's name. Only lasting results are stored; all but `ok` expire like an empty
search.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.cache import CacheNamespace
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus
from igpo_megatron.tools.base import Observed, Tool
from igpo_megatron.tools.settings import Visit
from igpo_megatron.tools.visit.fetch import PageStatus
from igpo_megatron.untrusted import json_loads_untrusted


@dataclass(frozen=True, slots=True)
class PageClient:
    """The visit tool as a SearchClient: a query is the JSON list of its arguments, its result the only passage."""

    tool: Tool

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per visit: ok, empty (an answer, but not a page), or an error that is worth another try."""
        return list(await asyncio.gather(*(self._one(query) for query in queries)))

    async def close(self) -> None:
        """Close the tool."""
        await self.tool.close()

    async def _one(self, query: str) -> SearchResult:
        shown = await self.tool.use(json_loads_untrusted(query))
        kind = PageStatus(shown.status)
        status = SearchStatus.OK if kind is PageStatus.OK else SearchStatus.EMPTY if kind.is_answer else SearchStatus.ERROR
        return SearchResult(query, status, "visit", (Passage(query, shown.status, shown.text),), shown.failure)


class StoredTool:
    """Tool that shows the results of a client like `PageClient`, or of the store around one."""

    def __init__(self, client: SearchClient):
        self.client = client

    async def use(self, arguments: Sequence[str]) -> Observed:
        """The tool's result, new or stored. Raises SearchStopped if a replay has no record of it."""
        (result,) = await self.client.search([json.dumps(list(arguments))])
        if len(result.passages) != 1:
            return Observed("", f"{result.provider}: the record of this call does not hold what was shown", "error", result.cached)
        (passage,) = result.passages
        return Observed(passage.text, result.error, passage.title, result.cached)

    async def close(self) -> None:
        """Close tool and store."""
        await self.client.close()


def visit_namespace(config: Visit) -> CacheNamespace:
    """Where pages are stored, by the settings that affect what is shown."""
    names = ("content", "max_tokens", "max_page_kib", "allow_hosts")
    summary = {name: getattr(config.summary, name) for name in ("model", "max_tokens")} if config.summary.url else None
    return CacheNamespace.of("visit", {**{name: getattr(config, name) for name in names}, "summary": summary})
