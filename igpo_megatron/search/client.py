"""Make a search client from its settings.

chaos? ── cache or record? ── HttpClient(a web API or a retriever) | local index        live, record, chaos
replay                                                                                   a record alone
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from igpo_megatron.search.cache import CachedClient, CacheNamespace, RecordingClient, ReplayClient, Store
from igpo_megatron.search.chaos import ChaosClient
from igpo_megatron.search.registry import backend_of, open_backend
from igpo_megatron.search.results import SearchClient, SearchStatus
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError


def make_client(config: Search) -> SearchClient:
    """The configured client, ready for use (bm25 reads its corpus here). UserError if its settings, key or corpus are wrong."""
    client = stored(config, namespace(config), lambda: open_backend(config))
    return ChaosClient(client, config.chaos) if config.mode == "chaos" else client


def stored(config: Search, namespace: CacheNamespace, make: Callable[[], SearchClient]) -> SearchClient:
    """`make`'s client behind the store that `search.mode` and `search.cache` ask for; a replay makes none. UserError as `make_client`."""
    if config.mode == "replay":
        path = _cache_file(config)
        if not path.is_file():
            raise UserError(f"search.mode=replay needs a record; search.cache={path} does not exist; make it with search.mode=record")
        return ReplayClient(Store(path), namespace)
    client = make()
    if config.mode == "record":
        return RecordingClient(client, Store(_cache_file(config)), namespace)
    if config.cache is not None:
        ages = {SearchStatus.OK: config.cache_ttl_s, SearchStatus.EMPTY: config.cache_empty_ttl_s}
        return CachedClient(client, Store(config.cache), namespace, ages)
    return client


def namespace(config: Search) -> CacheNamespace:
    """Where answers under these settings are stored. A corpus is identified by its name and size, so it may be moved."""

    def plain(value: Any) -> Any:
        return f"{value.name} ({value.stat().st_size if value.is_file() else 0} bytes)" if isinstance(value, Path) else value

    return CacheNamespace.of(config.backend, {name: plain(getattr(config, name)) for name in backend_of(config).decides})


def _cache_file(config: Search) -> Path:
    if config.cache is None:
        raise UserError(f"search.mode={config.mode} needs search.cache, the SQLite file of recorded answers")
    return config.cache
