"""Search back-ends by name; a user's own by `package.module:name`. A new one is one file and one row in `BACKENDS`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any

from igpo_megatron.search.backend import SearchBackend
from igpo_megatron.search.local.bm25 import Bm25Client
from igpo_megatron.search.local.dense import DenseClient
from igpo_megatron.search.local.hybrid import HybridClient
from igpo_megatron.search.providers.azure_bing import AzureBing
from igpo_megatron.search.providers.brave import Brave
from igpo_megatron.search.providers.brightdata import BrightData
from igpo_megatron.search.providers.google_cse import GoogleCse
from igpo_megatron.search.providers.retriever import Retriever
from igpo_megatron.search.providers.serpapi import SerpApi
from igpo_megatron.search.providers.serper import Serper
from igpo_megatron.search.providers.tavily import Tavily
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.settings import is_hook, lacks, load_hook, unknown
from igpo_megatron.types import UserError

KEY = "search.backend"

BACKENDS: dict[str, type[SearchBackend]] = {
    backend.provider: backend
    for backend in (
        *(Bm25Client, DenseClient, HybridClient),  # in this process
        *(Retriever, Serper, BrightData, AzureBing, SerpApi, GoogleCse, Tavily, Brave),  # over HTTP
    )
}
"""`search.backend` -> back-end."""


class Hooked(SearchBackend):
    """A user's back-end: a function or class that takes section `search` and returns a SearchClient."""

    decides = ("options", "corpus", "url", "country", "language", "top_k")

    def __init__(self, name: str, client: SearchClient):
        self._name, self._client = name, client

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """Only problems that show without creating a client, which may be slow or cost money."""
        try:
            make = load_hook(KEY, search.backend)
            inspect.signature(make).bind(search)
        except TypeError as error:
            yield f"{KEY}: {search.backend} cannot be called with section `search` alone ({error})"
        except UserError as error:
            yield str(error)
        else:
            yield from _unfit(search.backend, make) if isinstance(make, type) else ()

    @classmethod
    def open(cls, search: Search) -> SearchClient:
        """UserError if the result is not a SearchClient."""
        client = load_hook(KEY, search.backend)(search)
        for problem in _unfit(search.backend, client):
            raise UserError(problem)
        return cls(search.backend, client)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """The user's client's results. SearchStopped unless they are one per query."""
        found = await self._client.search(queries)
        if not isinstance(found, list) or len(found) != len(queries) or not all(isinstance(result, SearchResult) for result in found):
            what = f"expected a list of {len(queries)} SearchResult, found {str(found)[:200]}"
            raise SearchStopped(f"{KEY}: {self._name} was asked {len(queries)} queries; {what}")
        return found

    async def close(self) -> None:
        """Close the user's client."""
        await self._client.close()


def _unfit(name: str, client: Any) -> Iterator[str]:
    for method in lacks(client, ("search", "close")):
        yield f"{KEY}: {name} has no `async def {method}`; it must give a SearchClient, see igpo_megatron/search/results.py"


def backend_of(search: Search) -> type[SearchBackend]:
    """Raises UserError for an unknown name."""
    if search.backend in BACKENDS:
        return BACKENDS[search.backend]
    if is_hook(search.backend):
        return Hooked
    raise UserError(unknown(KEY, search.backend, BACKENDS))


def open_backend(search: Search) -> SearchClient:
    """The chosen back-end's client, ready for use. Raises UserError if its settings, its key or its files are wrong."""
    for problem in problems(search):
        raise UserError(problem)
    return backend_of(search).open(search)


def key_variable(search: Search) -> str | None:
    """Environment variable of the key; None if no key is needed."""
    return search.api_key_env or backend_of(search).key_variable


def problems(search: Search) -> Iterator[str]:
    """Problems of the chosen back-end, found before anything starts. A replay needs no key."""
    try:
        backend = backend_of(search)
    except UserError as error:
        yield str(error)
        return
    yield from backend.problems(search)
    if search.url is not None and backend is not Retriever and not search.url.startswith(("http://", "https://")):
        yield f"search.url={search.url!r}: expected an address that begins with http:// or https://"
    if "@" in (search.url or "").partition("://")[2].partition("/")[0]:
        yield "search.url holds a user name or password; addresses are logged, so name its variable by search.api_key_env instead"
    most = backend.most_results
    if most is not None and search.top_k > most:
        yield f"search.top_k={search.top_k}: {search.backend} gives at most {most} results per query; use {most}"
    variable = key_variable(search)
    if search.mode == "replay" or variable is None or os.environ.get(variable, "").strip():
        return
    if search.api_key_env is None:
        yield f"search.backend={search.backend} needs a key in {variable}: that environment variable is not set; export it"
    else:
        yield f"search.api_key_env={variable}: that environment variable is not set; export it, or set search.api_key_env=null"
