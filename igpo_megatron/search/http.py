"""The client of every HTTP back-end: one session, deadlines, retries, limits, and a status for every query.

queries ─ normalise ─ single-flight ─┬─ attempt: slot ─ gate ─ POST/GET ─ status and body checked ─ passages
                                     └─ temporary failure: back-off with jitter, then again while attempts and deadline allow

A refused key or a used-up quota stops the run. Keys are removed from every body before it is read or shown.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_exponential_jitter

from igpo_megatron.search.backend import SearchBackend
from igpo_megatron.search.flights import SingleFlight
from igpo_megatron.search.limits import AdaptiveLimit, Blocked, Gate
from igpo_megatron.search.providers.base import Meaning, Passages, Request, Secret, Sign, Unreadable, blot
from igpo_megatron.search.results import SearchResult, SearchStatus, SearchStopped, normalise
from igpo_megatron.search.settings import Search
from igpo_megatron.untrusted import BadJson, clean_text, json_loads_untrusted

_backoff = wait_exponential_jitter(multiplier=0.5, max=10, jitter=0.5)
"""0.5, 1, 2, 4, ... seconds, plus up to half a second so that clients do not all retry at once."""

MOST_BYTES = 16 * 2**20
"""A longer body is refused."""

LONGEST_PAUSE_S = 86_400.0
"""A longer Retry-After is ignored: it would block the rest of the run."""

MEANINGS: dict[int, Meaning] = {401: "key", 402: "quota", 403: "key", 429: "limited"}
"""What an HTTP status means by itself (RFC 9110, RFC 6585)."""


class RequestFailed(Exception):
    """One attempt failed."""

    def __init__(self, status: SearchStatus, message: str, *, passing: bool, retry_after_s: float | None = None):
        super().__init__(message)
        self.status = status
        self.passing = passing
        """Worth another attempt."""

        self.retry_after_s = retry_after_s
        """The server's Retry-After; None if it sent none."""


class HttpClient:
    """SearchClient over HTTP."""

    def __init__(self, backend: HttpBackend, config: Search):
        """`config` is read for times and limits only; `backend` has the rest."""
        self.backend = backend
        self.provider = backend.provider
        self.config = config
        self._slots = AdaptiveLimit(config.max_concurrency)
        self._gate = Gate(config.rate_per_s, config.breaker_failures, config.breaker_pause_s)
        self._flights = SingleFlight(self._fly, backend.batch)
        self._session: aiohttp.ClientSession | None = None
        self._stopped: SearchStopped | None = None

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query, within `search.deadline_s`. A query without words is `empty` and not sent. Raises SearchStopped."""
        start = time.perf_counter()
        wanted = [normalise(query) for query in queries]
        found = await self._flights.get([query for query in wanted if query])
        found[""] = SearchResult("", SearchStatus.EMPTY, self.provider)
        took = time.perf_counter() - start
        return [replace(found[key], query=query, latency_s=took) for key, query in zip(wanted, queries, strict=True)]

    async def close(self) -> None:
        """Close the connections."""
        await self._flights.close()
        if self._session is not None:
            await self._session.close()

    async def _fly(self, queries: Sequence[str]) -> dict[str, SearchResult]:
        """A result for each of at most `batch` queries. All queries of a request share its failure."""
        until = asyncio.get_running_loop().time() + self.config.deadline_s
        retry = retrying(self.config.attempts, may_pass, self.config.deadline_s)
        try:
            async with asyncio.timeout_at(until):
                found: list[Passages] = await retry(self._attempt, queries, until)
        except TimeoutError:
            why = f"not finished within search.deadline_s={self.config.deadline_s:g}"
            return {query: self._failed(query, SearchStatus.TIMEOUT, why) for query in queries}
        except RequestFailed as failure:
            return {query: self._failed(query, failure.status, str(failure)) for query in queries}
        return {query: SearchResult.answered(query, self.provider, passages) for query, passages in zip(queries, found, strict=True)}

    def _failed(self, query: str, status: SearchStatus, why: str) -> SearchResult:
        return SearchResult(query, status, self.provider, error=f"{self.backend.url}: {why}")

    async def _attempt(self, queries: Sequence[str], until: float) -> list[Passages]:
        """Wait for a turn and send one request; passages per query. Raises RequestFailed, SearchStopped."""
        async with self._slots.slot() as round_:
            try:
                await self._gate.enter(until)
            except Blocked as blocked:
                raise RequestFailed(blocked.status, f"not sent: {blocked}", passing=False) from None
            if self._stopped is not None:
                raise self._stopped
            # The attempt's own timeout starts here: waiting for other requests is not the provider's fault.
            try:
                passages = await self._ask(queries)
            except SearchStopped as stopped:
                self._stopped = stopped
                raise
            except RequestFailed as failure:
                self._learn(failure, round_)
                raise
            self._gate.answered()
            self._slots.done(round_, overloaded=False)
            return passages

    def _learn(self, failure: RequestFailed, round_: int) -> None:
        self._slots.done(round_, overloaded=failure.status in (SearchStatus.RATE_LIMITED, SearchStatus.TIMEOUT))
        if failure.retry_after_s is not None:
            self._gate.pause(failure.retry_after_s)
        # A provider that rate-limits or refuses this request is still up.
        if failure.passing and failure.status is not SearchStatus.RATE_LIMITED:
            self._gate.failed(failure.status)
        else:
            self._gate.answered()

    async def _ask(self, queries: Sequence[str]) -> list[Passages]:
        """Send one request and read the response. Raises RequestFailed, SearchStopped."""
        if self._session is None:
            # Created here because a session belongs to its event loop.
            self._session = open_session(self.config.timeout_s, trust_env=self.config.use_proxy)
        status, headers, text = await exchange(self._session, self.backend.request(queries), self.backend.key)
        if status != 200:
            raise self._refusal(status, headers, text, queries)
        try:
            answer = json_loads_untrusted(text)
        except BadJson as error:
            # A truncated or garbled body comes from a proxy or a failing server, which may recover.
            raise RequestFailed(SearchStatus.ERROR, f"the body is not JSON: {shown(text)} ({error})", passing=True) from None
        try:
            return self.backend.read(answer, len(queries))
        except Unreadable as unreadable:
            # Some providers refuse with status 200.
            if any(sign.fits(status, without(text, queries)) for sign in self.backend.signs):
                raise self._refusal(status, headers, text, queries) from None
            raise RequestFailed(SearchStatus.ERROR, f"{unreadable}; found {shown(text)}", passing=False) from None

    def _refusal(self, status: int, headers: Mapping[str, str], text: str, queries: Sequence[str]) -> RequestFailed | SearchStopped:
        """The error for a response that is not an answer."""
        what = f"HTTP {status}: {shown(text)}"
        signs = (sign.meaning for sign in self.backend.signs if sign.fits(status, without(text, queries)))
        match next(signs, None) or MEANINGS.get(status):
            case "key":
                key = self.backend.key
                held = f"the key in {key.variable}" if key else "a request without a key (search.api_key_env=null)"
                return SearchStopped(f"search.backend={self.provider} refuses {held} with {what}; set a valid key and start again")
            case "quota":
                return SearchStopped(
                    f"search.backend={self.provider} has no searches left, it says {what}; top up your plan and start again"
                )
            case "limited":
                after = parse_retry_after(headers.get("Retry-After"))
                return RequestFailed(SearchStatus.RATE_LIMITED, what, passing=True, retry_after_s=after)
        passing = status >= 500 or status in (408, 425)
        after = parse_retry_after(headers.get("Retry-After")) if passing else None
        return RequestFailed(SearchStatus.ERROR, what, passing=passing, retry_after_s=after)


@dataclass(frozen=True, kw_only=True)
class HttpBackend(SearchBackend):
    """A back-end over HTTP: it builds requests, reads answers and recognises refusals.

    Other fields of a subclass are filled from the settings of section `search` with the same names.
    """

    url: str
    """Address without parameters."""

    key: Secret | None = None
    """Never shown or stored."""

    top_k: int

    official: ClassVar[str | None] = None
    """The provider's own address, if it has one."""

    batch: ClassVar[int | None] = None
    """Most queries in one request; None for any number."""

    signs: ClassVar[tuple[Sign, ...]] = ()
    """Its own refusals. The first that fits is used; only then the HTTP status."""

    @classmethod
    def open(cls, search: Search) -> HttpClient:
        key = Secret.read(search.api_key_env or cls.key_variable)
        own = {field.name: getattr(search, field.name) for field in fields(cls) if field.name in Search.model_fields}
        return HttpClient(cls(**{**own, "url": search.url or cls.official, "key": key}), search)

    @abstractmethod
    def request(self, queries: Sequence[str]) -> Request:
        """The request for at most `batch` queries."""

    @abstractmethod
    def read(self, answer: Any, num_queries: int) -> list[Passages]:
        """Decoded body -> passages per query, at most `top_k` each. Raises Unreadable."""


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date, RFC 9110 10.2.3); 0 for a date in the past.

    None if it is absent, unreadable or more than LONGEST_PAUSE_S.
    """
    if value is None:
        return None
    if re.fullmatch("[0-9]{1,9}", value.strip()):
        seconds = float(value)
    else:
        try:
            when = email.utils.parsedate_to_datetime(value)
            seconds = max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError, LookupError, OverflowError):
            return None
    return seconds if seconds <= LONGEST_PAUSE_S else None


def without(text: str, queries: Sequence[str]) -> str:
    """The body without the queries it repeats: a policy must not stop a run by searching for "not enough credits"."""
    for query in queries:
        if len(query) >= 10:  # a shorter one cannot spell a refusal, and may be part of any word
            text = text.replace(json.dumps(query)[1:-1], "").replace(query, "")
    return text


def retrying(attempts: int, may_pass: Callable[[BaseException], bool], within_s: float = math.inf) -> AsyncRetrying:
    """Up to `attempts` tries with back-off, none begun after `within_s`, while `may_pass` is true of the error; the last is raised."""
    stop = stop_after_attempt(attempts) | stop_before_delay(within_s)
    return AsyncRetrying(stop=stop, wait=_backoff, retry=retry_if_exception(may_pass), reraise=True)


def may_pass(error: BaseException) -> bool:
    """A request failed for a reason that may be gone at another attempt."""
    return isinstance(error, RequestFailed) and error.passing


def open_session(timeout_s: float, trust_env: bool = False) -> aiohttp.ClientSession:
    """A session for JSON, without cookies and without a limit on connections, which its callers have; `trust_env` uses a proxy."""
    return aiohttp.ClientSession(
        headers={"Accept": "application/json"},
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=trust_env,
    )


async def exchange(session: aiohttp.ClientSession, request: Request, key: Secret | None) -> tuple[int, Mapping[str, str], str]:
    """Send one request; (status, headers, body without the key). Raises RequestFailed if there is no complete answer."""
    try:
        status, headers, body = await _send(session, request)
        return status, headers, blot(body.decode(errors="replace"), key)
    except TimeoutError:
        raise RequestFailed(SearchStatus.TIMEOUT, f"no answer within {session.timeout.total:g} s", passing=True) from None
    except aiohttp.InvalidURL:
        raise RequestFailed(SearchStatus.ERROR, "not a valid address; expected http://host:port/path", passing=False) from None
    except (aiohttp.ClientError, OSError) as error:
        # Without the cause: it may hold the whole address, parameters and key included.
        why = blot(clean_text(f"{type(error).__name__}: {error}"), key)
        raise RequestFailed(SearchStatus.ERROR, why, passing=True) from None
    except (ValueError, LookupError, ArithmeticError, AssertionError) as error:  # raised by header parsers
        why = blot(clean_text(f"no proper answer ({type(error).__name__}: {error})"), key)
        raise RequestFailed(SearchStatus.ERROR, why, passing=True) from None


async def _send(session: aiohttp.ClientSession, request: Request) -> tuple[int, Mapping[str, str], bytes]:
    body = bytearray()
    # No redirects: they would carry the key and the body to another host.
    async with session.request(
        request.method, request.url, params=request.params, headers=request.headers, json=request.body, allow_redirects=False
    ) as response:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MOST_BYTES:
                raise aiohttp.ClientPayloadError(f"the body is longer than {MOST_BYTES} bytes")
        return response.status, response.headers, bytes(body)


def shown(text: str) -> str:
    """The beginning of a body, for an error message."""
    short = " ".join(text[:400].split())
    return repr(short[:200]) if short else "an empty body"
