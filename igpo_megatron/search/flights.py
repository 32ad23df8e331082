"""Single-flight: a caller that asks for a key that is being fetched waits for that fetch instead of starting another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class SingleFlight(Generic[Key, Value]):
    """Runs `fetch` for keys that are not being fetched. A fetch is cancelled when its last caller has left."""

    def __init__(self, fetch: Callable[[Sequence[Key]], Coroutine[Any, Any, dict[Key, Value]]], batch: int | None):
        """`fetch` gets at most `batch` distinct keys at once (None: any number) and returns a value for each."""
        self._fetch = fetch
        self._batch = batch
        self._flying: dict[Key, asyncio.Task[dict[Key, Value]]] = {}
        self._keys: dict[asyncio.Task[dict[Key, Value]], Sequence[Key]] = {}
        self._waiting: Counter[asyncio.Task[dict[Key, Value]]] = Counter()

    async def get(self, keys: Sequence[Key]) -> dict[Key, Value]:
        """A value for each key. What `fetch` raises is raised in every caller that waits for it."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._flying]
        size = self._batch or max(1, len(missing))
        for first in range(0, len(missing), size):
            group = missing[first : first + size]
            task = asyncio.create_task(self._fetch(group))
            self._flying |= dict.fromkeys(group, task)
            self._keys[task] = group
            task.add_done_callback(self._landed)
        flights = {self._flying[key] for key in keys}
        self._waiting.update(flights)
        found: dict[Key, Value] = {}
        try:
            for flight in flights:
                found |= await asyncio.shield(flight)
        finally:
            self._waiting.subtract(flights)
            for flight in flights:
                if not self._waiting[flight]:
                    del self._waiting[flight]
                    self._forget(flight)
                    flight.cancel()
        return {key: found[key] for key in keys}

    async def close(self) -> None:
        """Cancel all running fetches."""
        flights = set(self._flying.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    def _landed(self, flight: asyncio.Task[dict[Key, Value]]) -> None:
        self._forget(flight)
        if not flight.cancelled():
            flight.exception()  # retrieved, so that asyncio does not report it as lost; callers get it anyway

    def _forget(self, flight: asyncio.Task[dict[Key, Value]]) -> None:
        """A cancelled fetch takes a moment to end; no caller may join it meanwhile."""
        for key in self._keys.pop(flight, ()):
            del self._flying[key]
