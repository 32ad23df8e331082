"""Answers in one SQLite file: the cache of live runs, and the record for replays.

(back-end, its parameters, normalised query) -> ok or empty, passages, when

Failed searches are never stored: they say nothing about the query.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.flights import SingleFlight
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus, SearchStopped, normalise
from igpo_megatron.types import UserError
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

logger = logging.getLogger(__name__)

_BUSY_S = 30.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    backend TEXT NOT NULL, parameters TEXT NOT NULL, query TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ok', 'empty')), passages TEXT NOT NULL, stored_at REAL NOT NULL,
    PRIMARY KEY (backend, parameters, query)
) WITHOUT ROWID
"""
"""`passages`: JSON list of [id, title, text]; `stored_at`: seconds since 1970."""


@dataclass(frozen=True, slots=True)
class CacheNamespace:
    """The part of the file that belongs to one way of searching."""

    backend: str
    parameters: str
    """JSON of everything besides the query that affects an answer; never a key."""

    @classmethod
    def of(cls, backend: str, parameters: Mapping[str, Any]) -> CacheNamespace:
        """Equal parameters give equal namespaces, in any order."""
        return cls(backend, json.dumps(parameters, sort_keys=True))


def _write_ahead(database: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite's own timeout does not hold here: while another process writes, it refuses at once."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


class Store:
    """The file. Several runs may open it at once (SQLite's write-ahead log). It is read and written in its own thread."""

    def __init__(self, path: Path):
        """Open or create the file. UserError if it is not a SQLite file or cannot be written."""
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search-cache")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
            _write_ahead(self._database)
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"search.cache={path}: {error}; name a SQLite file of this project, or a new one, in a writable folder"
            ) from None

    async def get(
        self, namespace: CacheNamespace, queries: Iterable[str], max_age_s: Mapping[SearchStatus, float | None]
    ) -> dict[str, SearchResult]:
        """Stored results of normalised queries, unless older than `max_age_s` of their status (None: any age). Their latency is 0."""
        return await self._in_thread(partial(self._get, namespace, list(queries), max_age_s))

    async def put(self, namespace: CacheNamespace, results: Iterable[SearchResult], *, replace: bool) -> None:
        """Store results under their normalised queries; `replace` False keeps existing rows. Never pass failed results."""
        rows = [
            (namespace.backend, namespace.parameters, result.query, result.status.value, json.dumps([astuple(p) for p in result.passages]))
            for result in results
        ]
        await self._in_thread(partial(self._put, rows, "REPLACE" if replace else "IGNORE"))

    async def other_parameters(self, namespace: CacheNamespace) -> list[str]:
        """Other parameters under which this back-end has answers."""
        select = "SELECT DISTINCT parameters FROM answers WHERE backend = ? AND parameters != ?"
        rows = await self._in_thread(lambda: self._database.execute(select, (namespace.backend, namespace.parameters)).fetchall())
        return [row[0] for row in rows]

    async def close(self) -> None:
        """Close the file after pending writes."""
        await self._in_thread(self._database.close)
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise SearchStopped(f"search.cache={self.path} cannot be used any longer: {error}; is the disk full?") from error

    def _get(
        self, namespace: CacheNamespace, queries: list[str], max_age_s: Mapping[SearchStatus, float | None]
    ) -> dict[str, SearchResult]:
        now = time.time()
        found = {}
        for query in queries:
            row = self._database.execute(
                "SELECT status, passages, stored_at FROM answers WHERE backend = ? AND parameters = ? AND query = ?",
                (namespace.backend, namespace.parameters, query),
            ).fetchone()
            if row is None:
                continue
            answer = _read_row(*row)
            if answer is None:
                logger.warning("%s: the answer stored for %r cannot be read and counts as absent", self.path, query[:80])
                continue
            status, passages, stored_at = answer
            allowed_s = max_age_s[status]
            if allowed_s is None or now - stored_at < allowed_s:
                found[query] = SearchResult(query, status, namespace.backend, passages, cached=True)
        return found

    def _put(self, rows: Sequence[tuple[str, ...]], conflict: str) -> None:
        stored_at = time.time()
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(f"INSERT OR {conflict} INTO answers VALUES (?, ?, ?, ?, ?, ?)", [(*row, stored_at) for row in rows])


def _read_row(status: Any, passages: Any, stored_at: Any) -> tuple[SearchStatus, tuple[Passage, ...], float] | None:
    """A stored row's columns; None if they are damaged or were written by something else."""
    if status not in (SearchStatus.OK.value, SearchStatus.EMPTY.value) or not isinstance(stored_at, float):
        return None
    try:
        rows = json_loads_untrusted(passages) if isinstance(passages, str) else None
    except BadJson:
        return None
    if not isinstance(rows, list) or not all(isinstance(row, list) and list(map(type, row)) == [str, str, str] for row in rows):
        return None
    if status == SearchStatus.OK.value and not rows:  # `ok` always has passages
        return None
    return SearchStatus(status), tuple(Passage(*row) for row in rows), stored_at


ANY_AGE: dict[SearchStatus, float | None] = {SearchStatus.OK: None, SearchStatus.EMPTY: None}


class CachedClient:
    """SearchClient that asks another one only for what is not stored, and never twice at once for the same query."""

    def __init__(self, inner: SearchClient, store: Store, namespace: CacheNamespace, max_age_s: Mapping[SearchStatus, float | None]):
        self.inner, self.store, self.namespace, self.max_age_s = inner, store, namespace, max_age_s
        # Around the store as well: a query that arrives while its answer is being stored waits for it.
        self._flights = SingleFlight(self._find, None)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query. Raises SearchStopped."""
        start = time.perf_counter()
        wanted = [normalise(query) for query in queries]
        found = await self._flights.get(wanted)
        took = time.perf_counter() - start
        return [replace(found[key], query=query, latency_s=took) for key, query in zip(wanted, queries, strict=True)]

    async def close(self) -> None:
        """Close the other client, then the file."""
        await self._flights.close()
        await self.inner.close()
        await self.store.close()

    async def _find(self, queries: Sequence[str]) -> dict[str, SearchResult]:
        """Results of distinct normalised queries: stored ones, else the other client's, which are stored if they are answers."""
        found = await self.store.get(self.namespace, queries, self.max_age_s)
        missing = [query for query in queries if query not in found]
        if missing:
            asked = await self.inner.search(missing)
            answers = [result for result in asked if result.status.is_answer]
            found |= {result.query: result for result in asked} | await self._keep(answers)
        return found

    async def _keep(self, answers: list[SearchResult]) -> dict[str, SearchResult]:
        """Store answers; returns the results that replace them, if any."""
        if answers:
            await self.store.put(self.namespace, answers, replace=True)
        return {}


class RecordingClient(CachedClient):
    """CachedClient that keeps the first answer to a query for good, so that a replay finds every answer that was used."""

    def __init__(self, inner: SearchClient, store: Store, namespace: CacheNamespace):
        super().__init__(inner, store, namespace, ANY_AGE)

    async def _keep(self, answers: list[SearchResult]) -> dict[str, SearchResult]:
        if answers:
            await self.store.put(self.namespace, answers, replace=False)
        # Another run may have been first.
        kept = await self.store.get(self.namespace, [answer.query for answer in answers], ANY_AGE)
        return {query: replace(result, cached=False) for query, result in kept.items()}


class ReplayClient:
    """SearchClient that answers from a record alone, with the same results every time."""

    def __init__(self, store: Store, namespace: CacheNamespace):
        self.store, self.namespace = store, namespace

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query, latency 0. Raises SearchStopped if the record has no answer."""
        wanted = [normalise(query) for query in queries]
        found = await self.store.get(self.namespace, set(wanted), ANY_AGE)
        for query in wanted:
            if query not in found:
                raise SearchStopped(await self._missing(query))
        return [replace(found[key], query=query) for key, query in zip(wanted, queries, strict=True)]

    async def close(self) -> None:
        """Close the file."""
        await self.store.close()

    async def _missing(self, query: str) -> str:
        others = await self.store.other_parameters(self.namespace)
        hint = f"this back-end was recorded with {' and '.join(others)}; " if others else ""
        asked = f"{self.namespace.backend} with {self.namespace.parameters}"
        return (
            f"search.mode=replay: {self.store.path} has no answer of {asked} to {query!r}; "
            f"{hint}record it with search.mode=record (searches that fail are not recorded)"
        )
