"""Caching proxy for paid search APIs: the provider's key stays on this host, every run has a budget, clients need a token.

export SERPER_API_KEY=... SEARCH_PROXY_TOKEN=$(openssl rand -hex 32)
igpo serve search --port 8001 --cache search.sqlite --budget 20000 backend=serper top_k=10 rate_per_s=50

The arguments after the options are settings of section `search`; `igpo config search` explains them. A run asks it with

    search.backend=retriever search.url=http://HOST:8001/runs/RUN/retrieve search.api_key_env=SEARCH_PROXY_TOKEN

POST /runs/RUN/retrieve  {"queries": [str, ...], "topk": int or null, "return_scores": bool}       Search-R1's shape; RUN names a budget
                         -> {"result": [[{"document": {"id", "contents"}}, ...], ...]}             with "scores": web results have none
                         -> {"result": [[{"id", "contents"}, ...], ...]}                           without
POST /retrieve           the same for the run called `default`
GET  /runs/RUN           {"run", "spent", "budget"}: paid searches
GET  /metrics            Prometheus' text format
GET  /health, /ready     {"status": "ok"}, without a token

token? ── run's cache ── budget ── igpo_megatron.search's HTTP engine ── provider

A failed search is never an empty result: 401 no token, 402 budget spent or a permanent refusal by the provider (our client stops the run),
422 wrong shape, 429 too fast, 502 and 504 the provider failed. Then the complete request fails; what was found stays in the cache.
The server never connects to an address in a request. Clients' `search.timeout_s` should be more than `deadline_s` here.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from aiohttp import web
from yarl import URL

from igpo_megatron.config.load import build
from igpo_megatron.search.cache import CachedClient, Store
from igpo_megatron.search.client import make_client, namespace
from igpo_megatron.search.providers.web import WebApi
from igpo_megatron.search.registry import BACKENDS
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.serve.budgets import Ledger, Metered
from igpo_megatron.serve.http import Handler, Metrics, base_url, document, is_loopback, listen, read_request, refusal, serve
from igpo_megatron.tools.tally import why_failed
from igpo_megatron.types import UserError

RUN = "{run:[A-Za-z0-9._-]{1,64}}"
OPEN = ("/health", "/ready")
"""Paths that need no token: they reveal nothing."""

SHORTEST_TOKEN = 16
MOST_BYTES = 2**20
"""Of a request: hundreds of queries."""

GRACE_S = 5
"""Seconds beyond `search.deadline_s` for pending requests when the server ends."""

STATUSES = {SearchStatus.RATE_LIMITED: 429, SearchStatus.ERROR: 502, SearchStatus.TIMEOUT: 504}


@dataclass(frozen=True)
class Settings:
    """Settings from the command line."""

    search: Search
    budget: int
    """Paid searches per run."""

    token: str | None = field(repr=False)
    """None accepts everybody on this machine."""


class Proxy:
    """The endpoints over one provider, one cache and one ledger. Used from one event loop."""

    def __init__(self, settings: Settings):
        """Raises ValueError if the back-end's settings, its key or the cache file are wrong."""
        search = settings.search
        assert search.cache is not None, "the cache is a required option"
        self.settings = settings
        self.metrics = Metrics("search_proxy")
        self._queries = self.metrics.counter("queries", "Queries of each run, those of the cache included.", "run")
        self._paid = self.metrics.gauge("paid_queries_total", "Queries of each run that the provider was asked.", "run")
        self._refused = self.metrics.counter("refused", "Requests without the token.")
        self._provider: SearchClient = make_client(search.model_copy(update={"cache": None}))
        self._store = Store(search.cache)
        self._ledger = Ledger(search.cache)
        self._runs: dict[str, CachedClient] = {}

    def app(self) -> web.Application:
        """For aiohttp."""
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[self._guard])
        for path in ("/retrieve", f"/runs/{RUN}/retrieve"):
            app.router.add_post(path, self.metrics.watch(self._retrieve))
        app.router.add_get(f"/runs/{RUN}", self._spent)
        app.router.add_get("/metrics", self._metrics)
        for path in OPEN:
            app.router.add_get(path, self._health)
        app.on_cleanup.append(self._close)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests without the token; if there is none, requests to a name that is not this machine's (from a web page)."""
        if request.path in OPEN:
            return await handler(request)
        if self.settings.token is None:
            if not _is_local(request.host):
                raise refusal(403, "without a token this server answers only to its loopback address; start it with one")
        elif not _holds(request.headers.get("Authorization", ""), self.settings.token):
            self._refused.inc()
            raise refusal(401, "send the server's token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        return await handler(request)

    async def _retrieve(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a web page may not send that to another host without permission
            raise refusal(415, f"Content-Type is {request.content_type}, expected application/json")
        asked = await read_request(request)
        most = self.settings.search.top_k
        if asked.topk is not None and asked.topk > most:
            raise refusal(422, f"topk={asked.topk}: {most} passages per query are fetched here; ask for as many at most, or set top_k here")
        run = request.match_info.get("run", "default")
        self._queries.labels(run).inc(len(asked.queries))
        try:
            results = await self._client(run).search(asked.queries)
        except SearchStopped as stopped:
            raise refusal(402, str(stopped)) from None
        _raise_failure(results)
        documents = [[document(passage) for passage in result.passages[: asked.topk or most]] for result in results]
        if asked.return_scores:
            return web.json_response({"result": [[{"document": found} for found in hits] for hits in documents]})
        return web.json_response({"result": documents})

    def _client(self, run: str) -> CachedClient:
        """A run's client for the shared cache and provider."""
        if run not in self._runs:
            search = self.settings.search
            ages = {SearchStatus.OK: search.cache_ttl_s, SearchStatus.EMPTY: search.cache_empty_ttl_s}
            metered = Metered(self._provider, self._ledger, run, self.settings.budget)
            self._runs[run] = CachedClient(metered, self._store, namespace(search), ages)
        return self._runs[run]

    async def _spent(self, request: web.Request) -> web.Response:
        run = request.match_info["run"]
        return web.json_response({"run": run, "spent": self._ledger.spent(run), "budget": self.settings.budget})

    async def _metrics(self, request: web.Request) -> web.Response:
        for run, spent in self._ledger.all().items():
            self._paid.labels(run).set(spent)
        return await self.metrics.answer(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _close(self, app: web.Application) -> None:
        await self._provider.close()
        await self._store.close()
        self._ledger.close()


def _raise_failure(results: Sequence[SearchResult]) -> None:
    failed = [result for result in results if not result.status.is_answer]
    if failed:
        detail = f"{len(failed)} of {len(results)} searches failed, the first by {why_failed(failed[0])}"
        raise refusal(STATUSES[failed[0].status], detail)


def _holds(header: str, token: str) -> bool:
    """True if an Authorization header holds the token; the time does not depend on how much matches."""
    scheme, _, value = header.partition(" ")
    right = hmac.compare_digest(value.strip().encode(errors="surrogateescape"), token.encode())
    return right and scheme.lower() == "bearer"


def _is_local(host: str) -> bool:
    """True for `localhost` and loopback addresses, with or without a port."""
    try:
        name = URL.build(scheme="http", authority=host).host or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_settings(cache: Path, budget: int, token_variable: str, host: str, settings: Sequence[str]) -> Settings:
    """Raises ValueError with one sentence about what is wrong, such as no token on a host that others can reach."""
    # A configuration must name a model; other sections are not used here.
    search = build({"model": {"path": "."}}, [f"search.{setting}" for setting in settings]).search.model_copy(update={"cache": cache})
    web_apis = [name for name, backend in BACKENDS.items() if issubclass(backend, WebApi)]
    if search.backend not in web_apis:
        raise UserError(
            f"backend={search.backend} is no web API; expected backend=NAME with one of {', '.join(web_apis)} "
            "(`igpo serve retriever` serves a corpus)"
        )
    if search.mode != "live":
        raise UserError(f"mode={search.mode}: the proxy always asks live and caches; leave mode out, clients may record and replay")
    token = os.environ.get(token_variable, "").strip() or None
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host} can be reached from other machines and {token_variable} is not set; "
            f"export {token_variable}=$(openssl rand -hex 32), or listen on 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UserError(f"{token_variable} has {len(token)} characters, expected at least {SHORTEST_TOKEN}; take $(openssl rand -hex 32)")
    return Settings(search, budget, token)


def search(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")],
    cache: Annotated[Path, typer.Option(help="SQLite file of answers and of what each run has used; made if absent.")],
    budget: Annotated[int, typer.Option(min=0, help="Paid searches that each run may use; cached answers are free.")],
    settings: Annotated[list[str], typer.Argument(help="Settings of section search, such as backend=serper top_k=10.")],
    host: Annotated[str, typer.Option(help="Address to listen on; anything but loopback needs a token.")] = "127.0.0.1",
    token_env: Annotated[str, typer.Option(help="Environment variable that holds the clients' token.")] = "SEARCH_PROXY_TOKEN",
) -> None:
    """Serve a paid search API to runs until interrupted."""
    given = read_settings(cache, budget, token_env, host, settings)
    proxy = Proxy(given)
    listener = listen(host, port)
    guarded = f"token in {token_env}" if given.token else "no token"
    said = f"serving {given.search.backend} on {base_url(host, listener)}/retrieve ({guarded}, {budget} paid searches per run)"
    grace_s = given.search.deadline_s + GRACE_S
    asyncio.run(serve(proxy.app(), listener, stop=asyncio.Event(), grace_s=grace_s, announce=lambda: typer.echo(said)))
