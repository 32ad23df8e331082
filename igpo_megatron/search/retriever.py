"""Client of a server that speaks Search-R1's protocol.

    POST url {"queries": [str, ...], "topk": int, "return_scores": true}
    200 {"result": [[hit, ...], ...]}      one list per query; hit = {"document": {"id", "contents"}, "score"} or {"id", "contents"}

One call is one request for all its queries, tried again with exponential back-off and jitter while the trouble may pass.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from igpo_megatron.config.schema import Search
from igpo_megatron.data.corpus import Passage, split_contents
from igpo_megatron.search.results import SearchResult, SearchStatus

_backoff = wait_exponential_jitter(initial=0.5, max=10, jitter=0.5)
"""0.5, 1, 2, 4, ... seconds, plus up to half a second so that many clients do not come back at once."""


class RequestFailed(Exception):
    """One attempt failed."""

    def __init__(self, status: SearchStatus, message: str, *, passing: bool, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.passing = passing
        """Worth another attempt."""

        self.retry_after_s = retry_after_s
        """What the server asked for; None where it did not say."""


class RetrieverClient:
    """SearchClient over HTTP."""

    provider = "retriever"

    def __init__(self, url: str, *, top_k: int, timeout_s: float, attempts: int, max_concurrency: int, api_key: str | None = None):
        self.url = url
        self.top_k = top_k
        self.timeout_s = timeout_s
        self.attempts = attempts
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._slots = asyncio.Semaphore(max_concurrency)
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def from_config(cls, config: Search) -> RetrieverClient:
        """ValueError where the address or the key's environment variable is missing."""
        if config.url is None:
            raise ValueError("search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve")
        if config.api_key_env is not None and not os.environ.get(config.api_key_env):
            raise ValueError(f"search.api_key_env={config.api_key_env}: that environment variable is not set")
        return cls(
            config.url,
            top_k=config.top_k,
            timeout_s=config.timeout_s,
            attempts=config.attempts,
            max_concurrency=config.max_concurrency,
            api_key=os.environ[config.api_key_env] if config.api_key_env else None,
        )

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query. All queries of a call share a request and, where it fails, its status."""
        if not queries:
            return []
        start = time.perf_counter()
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.attempts),
            wait=self._wait,
            retry=retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.passing),
            reraise=True,
        )
        try:
            found: list[tuple[Passage, ...]] = await retrying(self._attempt, queries)
        except RequestFailed as error:
            took = time.perf_counter() - start
            return [SearchResult(query, error.status, self.provider, error=f"{self.url}: {error}", latency_s=took) for query in queries]
        took = time.perf_counter() - start
        return [
            SearchResult(query, SearchStatus.OK if passages else SearchStatus.EMPTY, self.provider, passages, latency_s=took)
            for query, passages in zip(queries, found, strict=True)
        ]

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _attempt(self, queries: Sequence[str]) -> list[tuple[Passage, ...]]:
        """One request; passages per query. Raises RequestFailed."""
        # The slot is taken before the clock starts: waiting for other requests is not the server's fault.
        async with self._slots:
            try:
                status, headers, body = await self._post({"queries": list(queries), "topk": self.top_k, "return_scores": True})
            except TimeoutError:
                raise RequestFailed(SearchStatus.TIMEOUT, f"no answer within {self.timeout_s:g} s", passing=True) from None
            except aiohttp.InvalidURL:
                raise RequestFailed(SearchStatus.ERROR, "not a valid address; expected http://host:port/retrieve", passing=False) from None
            except aiohttp.ClientError as error:
                raise RequestFailed(SearchStatus.ERROR, f"{type(error).__name__}: {error}", passing=True) from error
        if status != 200:
            limited = status == 429
            raise RequestFailed(
                SearchStatus.RATE_LIMITED if limited else SearchStatus.ERROR,
                f"HTTP {status}: {_shown(body)}",
                passing=limited or status >= 500,
                retry_after_s=parse_retry_after(headers.get("Retry-After")),
            )
        try:
            decoded = json.loads(body)
        except ValueError:
            # A cut or garbled body: a proxy or a dying server, which may recover.
            raise RequestFailed(SearchStatus.ERROR, f"the body is not JSON: {_shown(body)}", passing=True) from None
        return read_answer(decoded, len(queries), self.top_k)

    async def _post(self, request: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            # Made here because a session belongs to the event loop it is made in. The semaphore is the only limit on connections.
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=self.timeout_s),
                connector=aiohttp.TCPConnector(limit=0),
            )
        async with self._session.post(self.url, json=request) as response:
            return response.status, response.headers, await response.read()

    def _wait(self, state: RetryCallState) -> float:
        """Back-off, or what the server asked for if that is longer, but never longer than one attempt may take."""
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, RequestFailed) else None
        return max(_backoff(state), min(asked or 0.0, self.timeout_s))


def read_answer(decoded: Any, num_queries: int, top_k: int) -> list[tuple[Passage, ...]]:
    """Decoded body -> passages per query, at most `top_k` each. Raises RequestFailed where it does not have the protocol's shape."""
    lists = decoded.get("result") if isinstance(decoded, dict) else None
    if not isinstance(lists, list) or len(lists) != num_queries or not all(isinstance(hits, list) for hits in lists):
        found = _shown(json.dumps(decoded).encode())
        raise RequestFailed(SearchStatus.ERROR, f'expected {{"result": [...]}} with {num_queries} lists; found {found}', passing=False)
    return [tuple(_passage(hit) for hit in hits[:top_k]) for hits in lists]


def _passage(hit: Any) -> Passage:
    """A hit with or without a score; some servers give a document as bare text, or without an id."""
    document = hit["document"] if isinstance(hit, dict) and "document" in hit else hit
    if isinstance(document, str):
        document = {"contents": document}
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str):
        raise RequestFailed(
            SearchStatus.ERROR, f"expected a document with contents; found {_shown(json.dumps(hit).encode())}", passing=False
        )
    title, text = split_contents(contents)
    return Passage(str(document["id"]) if "id" in document else "", title, text)


def parse_retry_after(value: str | None) -> float | None:
    """Seconds a Retry-After header asks for (a number or an HTTP date, RFC 9110 10.2.3); None where it is absent or unreadable."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _shown(body: bytes) -> str:
    """The beginning of a body, for an error message."""
    text = " ".join(body[:400].decode(errors="replace").split())
    return repr(text[:200]) if text else "an empty body"
