"""From configuration to a search client. A new back-end is one class and one line in `CLIENTS`."""

from __future__ import annotations

from collections.abc import Callable

from igpo_megatron.config.schema import Search
from igpo_megatron.search.bm25 import Bm25Client
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus
from igpo_megatron.search.retriever import RetrieverClient

__all__ = ["CLIENTS", "SearchClient", "SearchResult", "SearchStatus", "make_client"]

CLIENTS: dict[str, Callable[[Search], SearchClient]] = {
    "bm25": Bm25Client.from_config,
    "retriever": RetrieverClient.from_config,
}
"""`search.backend` -> client."""


def make_client(config: Search) -> SearchClient:
    """The configured client, ready for use (bm25 reads its corpus here). ValueError where its settings or corpus are wrong."""
    return CLIENTS[config.backend](config)
