"""What a search gives back, and the protocol of everything that can search."""

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
    """No search can succeed until a person acts: a refused key, a used-up quota, a replay without the answer."""


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
    """One sentence for people; None where the provider answered."""

    latency_s: float = 0.0
    """Wall time of the call, retries included."""

    cached: bool = field(default=False, compare=False)
    """Answered by the store of search/cache.py; nobody was asked."""


def normalise(query: str) -> str:
    """The form in which a query is compared, sent and stored: clean, Unicode NFC, single spaces. Letter case stays, encoders may see it."""
    return " ".join(unicodedata.normalize("NFC", clean_text(query)).split())


class SearchClient(Protocol):
    """Anything that answers queries. Used from one event loop; a call may be cancelled at any point.

    A back-end that takes one query per request (a web API) and one that takes many look the same: each query has its own status.
    """

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query, in order. Passing trouble of the provider is a status; SearchStopped where only a person can help."""
        ...

    async def close(self) -> None:
        """Give back connections. The client is not used afterwards."""
        ...
