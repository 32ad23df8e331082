"""From configuration to a search client. A new back-end is one class, one line in `CLIENTS` and one in `DECIDES`.

chaos? ── cache or record? ── HttpClient(a web API or a retriever) | BM25 | dense        live, record, chaos
replay                                                                                   a record alone
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from igpo_megatron.search.cache import CachedClient, RecordingClient, ReplayClient, Shelf, Store
from igpo_megatron.search.chaos import ChaosClient
from igpo_megatron.search.http import HttpClient
from igpo_megatron.search.local.bm25 import Bm25Client
from igpo_megatron.search.local.dense import DenseClient
from igpo_megatron.search.providers.retriever import Retriever
from igpo_megatron.search.providers.web import WEB_APIS, WebApi
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError

__all__ = ["CLIENTS", "SearchClient", "SearchResult", "SearchStatus", "SearchStopped", "make_client"]


def _http(backend: type[WebApi] | type[Retriever], config: Search) -> SearchClient:
    return HttpClient(backend.from_config(config), config)


CLIENTS: dict[str, Callable[[Search], SearchClient]] = {
    "bm25": Bm25Client.from_config,
    "dense": DenseClient.from_config,
    "retriever": partial(_http, Retriever),
    **{name: partial(_http, api) for name, api in WEB_APIS.items()},
}
"""`search.backend` -> client."""

DECIDES: dict[str, tuple[str, ...]] = {
    "bm25": ("corpus", "top_k"),
    "dense": ("corpus", "encoder", "query_prefix", "passage_prefix", "top_k"),
    "retriever": ("url", "top_k"),
    "serper": ("country", "language", "top_k"),
    "brightdata": ("country", "language", "top_k"),
    "azure_bing": ("country", "language", "top_k"),
    "serpapi": ("country", "language", "top_k"),
    "google_cse": ("engine_id", "country", "language", "top_k"),
    "tavily": ("top_k",),
    "brave": ("country", "language", "top_k"),
}
"""`search.backend` -> the settings that decide an answer: an answer stored under others is not used."""


def make_client(config: Search) -> SearchClient:
    """The configured client, ready for use (bm25 reads its corpus here). UserError where its settings, key or corpus are wrong."""
    client = stored(config, shelf(config), lambda: CLIENTS[config.backend](config))
    return ChaosClient(client, config.chaos) if config.mode == "chaos" else client


def stored(config: Search, shelf: Shelf, make: Callable[[], SearchClient]) -> SearchClient:
    """What `make` makes behind the store, as `search.mode` and `search.cache` say; a replay makes nothing. UserError as `make_client`."""
    if config.mode == "replay":
        path = _cache_file(config)
        if not path.is_file():
            raise UserError(f"search.mode=replay needs a record; search.cache={path} does not exist; make it with search.mode=record")
        return ReplayClient(Store(path), shelf)
    client = make()
    if config.mode == "record":
        return RecordingClient(client, Store(_cache_file(config)), shelf)
    if config.cache is not None:
        ages = {SearchStatus.OK: config.cache_ttl_s, SearchStatus.EMPTY: config.cache_empty_ttl_s}
        return CachedClient(client, Store(config.cache), shelf, ages)
    return client


def shelf(config: Search) -> Shelf:
    """Where answers to these settings are stored. A corpus is known by its name and size, so that it may move."""
    return Shelf.of(config.backend, {name: _plain(getattr(config, name)) for name in DECIDES[config.backend]})


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return f"{value.name} ({value.stat().st_size if value.is_file() else 0} bytes)"
    return value


def _cache_file(config: Search) -> Path:
    if config.cache is None:
        raise UserError(f"search.mode={config.mode} needs search.cache, the SQLite file of recorded answers")
    return config.cache
