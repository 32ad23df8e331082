"""Results of a search, and the interface of all search clients."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from igpo_megatron.data.corpus import Passage
from igpo_megatron.types import RunStopped
from igpo_megatron.untrusted import clean_text


class SearchStopped(RunStopped):
    """No search can succeed until a person acts: the key was refused, the quota is used up, or a replay has no such answer."""


class SearchStatus(StrEnum):
    """How one query ended."""

    OK = "ok"
    """At least one passage."""

    EMPTY = "empty"
    """The provider answered that nothing matches; as valid as `ok`."""

    ERROR = "error"
    """The provider refused, broke or could not be reached."""

    TIMEOUT = "timeout"
    """The last attempt passed its deadline."""

    RATE_LIMITED = "rate_limited"
    """The provider still asked to slow down after the last attempt."""

    @property
    def is_answer(self) -> bool:
        """True if the provider answered. Anything else says nothing about the query: never show it as an empty result, never cache it."""
        return self in (SearchStatus.OK, SearchStatus.EMPTY)


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The outcome of one query."""

    query: str
    status: SearchStatus
    provider: str
    """Name of the back-end, e.g. `bm25`."""

    passages: tuple[Passage, ...] = ()
    """Best first; empty unless `ok`."""

    error: str | None = None
    """One sentence for people; None if the provider answered."""

    latency_s: float = 0.0
    """Wall time of the call, retries included."""

    cached: bool = field(default=False, compare=False)
    """Answered from the store of search/cache.py; the provider was not asked."""

    @classmethod
    def answered(cls, query: str, provider: str, passages: Sequence[Passage], latency_s: float = 0.0) -> SearchResult:
        """The provider answered: `ok` with passages, `empty` without."""
        return cls(query, SearchStatus.OK if passages else SearchStatus.EMPTY, provider, tuple(passages), latency_s=latency_s)


def normalise(query: str) -> str:
    """The form in which queries are compared, sent and stored: clean, Unicode NFC, single spaces. Letter case is kept for encoders."""
    return " ".join(unicodedata.normalize("NFC", clean_text(query)).split())


class SearchClient(Protocol):
    """Anything that answers queries. Used from one event loop; a call may be cancelled at any point.

    Each query has its own status, whether the back-end takes one query per request (a web API) or many.
    """

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query, in order. Temporary failures of the provider are statuses; SearchStopped if only a person can help."""
        ...

    async def close(self) -> None:
        """Release connections. The client is not used afterwards."""
        ...
