"""A server on loopback that speaks the protocol of every search provider, checks what it is sent, and fails when told to.

    async with serving(fault=lambda asked: "500" if asked.number == 0 else None) as server:
        client = make_client(settings("serper", server))

Its world: a query has three documents, see `documents`; one that contains "nothing" has none.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from aiohttp import web

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.settings import Search

KEY = "s3cret/with+odd&signs=1"
KEY_VARIABLE = "SEARCH_TEST_KEY"
PROVIDERS = ("retriever", "serper", "brightdata", "azure_bing", "serpapi", "google_cse", "tavily", "brave")


def documents(query: str, k: int = 3) -> list[dict[str, str]]:
    """What the world holds on a query."""
    if "nothing" in query:
        return []
    return [
        {"title": f"Title {n}", "link": f"https://site{n}.example/{len(query)}", "text": f"What source {n} has to say about {query}"}
        for n in range(min(k, 3))
    ]


def passages(query: str, k: int = 3) -> tuple[Passage, ...]:
    """The same, as a client should see it."""
    return tuple(Passage(d["link"], d["title"], d["text"]) for d in documents(query, k))


def settings(provider: str, server: SearchServer, **changes: Any) -> Search:
    """A configuration that asks the server; set KEY_VARIABLE to KEY first."""
    own = {"brightdata": {"zone": "serp1"}, "google_cse": {"engine_id": "cx1"}}.get(provider, {})
    quick = {"top_k": 3, "timeout_s": 5.0, "deadline_s": 20.0, "attempts": 3}
    return Search(**{"backend": provider, "url": f"{server.url}/{provider}", "api_key_env": KEY_VARIABLE, **own, **quick, **changes})


@dataclass
class Asked:
    """One request the server got."""

    provider: str
    queries: list[str]
    number: int
    """How often this query was asked before."""

    body: Any
    params: dict[str, str]
    headers: dict[str, str] = field(repr=False)
    fault: str | None = None


class Refused(Exception):
    """The provider's own words for a request it does not like."""

    def __init__(self, status: int, body: Any):
        self.status, self.body = status, body


def say(answer: Any, status: int = 200, **headers: str) -> web.Response:
    return web.Response(status=status, text=json.dumps(answer), content_type="application/json", headers=headers)


FAULTS = ("429", "500", "broken", "html", "empty_list", "reset", "never")
"""What the server can be told; also "401", "quota", "slow", "redirect", "429 SECONDS" for a Retry-After, "say WORDS" to refuse with
them, "echo" to repeat the key."""


class SearchServer:
    """State of a running server."""

    def __init__(self, fault: Callable[[Asked], str | None]):
        self.fault = fault
        self.url = ""
        self.asked: list[Asked] = []
        self.running = self.most_running = 0
        self.slow_s = 0.3
        self._numbers: Counter[tuple[str, ...]] = Counter()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        provider = request.path.strip("/")
        body = await request.json() if request.method == "POST" else None
        queries, refusal = [], None
        try:
            queries = SPOKEN[provider].queries(request, body)
        except Refused as refused:
            refusal = refused
        asked = Asked(provider, queries, self._numbers[tuple(queries)], body, dict(request.query), dict(request.headers))
        self._numbers[tuple(queries)] += 1
        self.asked.append(asked)
        if refusal:
            return say(refusal.body, refusal.status)
        asked.fault = self.fault(asked)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if asked.fault:
                return await self._fail(request, asked, asked.fault)
            return say(SPOKEN[provider].answer(queries))
        finally:
            self.running -= 1

    async def _fail(self, request: web.Request, asked: Asked, fault: str) -> web.StreamResponse:
        spoken = SPOKEN[asked.provider]
        match fault.split():
            case ["slow"]:
                await asyncio.sleep(self.slow_s)
                return say(spoken.answer(asked.queries))
            case ["echo"]:
                return say(spoken.answer([f"{query} {KEY}" for query in asked.queries]))
            case ["never"]:
                await asyncio.Event().wait()
            case ["reset"]:
                assert request.transport is not None
                request.transport.abort()
            case ["broken"]:
                return web.Response(text=json.dumps(spoken.answer(asked.queries))[:-5])
            case ["html"]:
                return web.Response(text="<html><body>Checking your browser</body></html>", content_type="text/html")
            case ["empty_list"]:
                return say([])
            case ["401"]:
                return say({"error": f"unknown key {KEY}"}, 401)
            case ["quota"]:
                return say(spoken.quota[1], spoken.quota[0])
            case ["say", *words]:
                return say({"message": " ".join(words), "statusCode": 400}, 400)
            case ["redirect"]:
                return web.Response(status=302, headers={"Location": f"{self.url}/{asked.provider}?elsewhere=1"})
            case ["429", seconds]:
                return say({"message": "slow down"}, 429, **{"Retry-After": seconds})
            case ["429"]:
                return say({"message": "slow down"}, 429)
            case [status]:
                return say({"message": "out of order"}, int(status))
        return web.Response()


@asynccontextmanager
async def serving(fault: Callable[[Asked], str | None] = lambda asked: None) -> AsyncIterator[SearchServer]:
    """A running server; it ends with the block, whatever hangs in it."""
    server = SearchServer(fault)
    app = web.Application()
    app.router.add_route("*", "/{provider}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Spoken:
    """One provider's protocol, seen from its side."""

    queries: Callable[[web.Request, Any], list[str]]
    """Check a request and take its queries out. Raises Refused."""

    answer: Callable[[list[str]], Any]
    quota: tuple[int, Any]
    """What it says when nothing is left to spend."""


def _expect(fine: bool, status: int, body: Any) -> None:
    if not fine:
        raise Refused(status, body)


def _bearer(request: web.Request, status: int, body: Any) -> None:
    _expect(request.headers.get("Authorization") == f"Bearer {KEY}", status, body)


def _retriever(request: web.Request, body: Any) -> list[str]:
    if "Authorization" in request.headers:
        _bearer(request, 401, {"detail": "Invalid token"})
    known = set(body) == {"queries", "topk", "return_scores"} and isinstance(body["queries"], list)
    _expect(request.method == "POST" and known, 422, {"detail": [{"msg": "field required"}]})
    return body["queries"]


def _serper(request: web.Request, body: Any) -> list[str]:
    _expect(request.headers.get("X-API-KEY") == KEY, 403, {"message": "Unauthorized.", "statusCode": 403})
    _expect(set(body) == {"q", "num", "gl", "hl"}, 400, {"message": "Bad request", "statusCode": 400})
    return [body["q"]]


def _brightdata(request: web.Request, body: Any) -> list[str]:
    _bearer(request, 401, "Invalid token")
    _expect(body.get("zone") == "serp1" and body.get("format") == "raw", 400, {"error": "zone not found"})
    page = urlsplit(body["url"])
    wanted = parse_qs(page.query)
    right = page.hostname == "www.bing.com" and page.path == "/search" and wanted["brd_json"] == ["1"] and wanted["mkt"] == ["en-US"]
    _expect(right, 400, {"error": "url is not supported"})
    return wanted["q"]


def _azure_bing(request: web.Request, body: Any) -> list[str]:
    denied = {"error": {"code": "401", "message": "Access denied due to invalid subscription key or wrong API endpoint."}}
    _expect(request.headers.get("Ocp-Apim-Subscription-Key") == KEY, 401, denied)
    _expect(request.method == "GET" and request.query["mkt"] == "en-US", 400, {"_type": "ErrorResponse"})
    return [request.query["q"]]


def _serpapi(request: web.Request, body: Any) -> list[str]:
    wrong = {"error": "Invalid API key. Your API key should be here: https://serpapi.com/manage-api-key"}
    _expect(request.query.get("api_key") == KEY, 401, wrong)
    _expect(request.method == "GET" and request.query["engine"] == "google", 400, {"error": "Unsupported engine"})
    return [request.query["q"]]


def _google_cse(request: web.Request, body: Any) -> list[str]:
    message = "API key not valid. Please pass a valid API key."
    wrong = {"error": {"code": 400, "message": message, "errors": [{"reason": "badRequest"}], "status": "INVALID_ARGUMENT"}}
    _expect(request.query.get("key") == KEY, 400, wrong)
    _expect(request.query.get("cx") == "cx1" and int(request.query["num"]) <= 10, 400, {"error": {"code": 400}})
    return [request.query["q"]]


def _tavily(request: web.Request, body: Any) -> list[str]:
    _bearer(request, 401, {"detail": {"error": "Unauthorized: missing or invalid API key."}})
    _expect(len(body["query"]) <= 400, 400, {"detail": {"error": "Query is too long. Max query length is 400 characters."}})
    return [body["query"]]


def _brave(request: web.Request, body: Any) -> list[str]:
    wrong = {"type": "ErrorResponse", "error": {"status": 422, "code": "SUBSCRIPTION_TOKEN_INVALID", "detail": "The token is invalid."}}
    _expect(request.headers.get("X-Subscription-Token") == KEY, 422, wrong)
    query = request.query["q"]
    too_long = {"type": "ErrorResponse", "error": {"status": 422, "code": "VALIDATION"}}
    _expect(len(query) <= 400 and len(query.split()) <= 50, 422, too_long)
    return [query]


def _results(queries: list[str], **names: str) -> list[dict[str, str]]:
    """The documents on the only query under the provider's field names, e.g. title="name"."""
    return [{names.get(field, field): value for field, value in found.items()} for found in documents(queries[0])]


def _serpapi_answer(queries: list[str]) -> Any:
    if not documents(queries[0]):
        return {"search_metadata": {"status": "Success"}, "error": "Google hasn't returned any results for this query."}
    return {"search_metadata": {"status": "Success"}, "organic_results": _results(queries, text="snippet")}


def _retriever_answer(queries: list[str]) -> Any:
    return {
        "result": [
            [{"document": {"id": d["link"], "contents": f'"{d["title"]}"\n{d["text"]}'}, "score": 0.5} for d in documents(query)]
            for query in queries
        ]
    }


SPOKEN = {
    "retriever": Spoken(_retriever, _retriever_answer, (402, {"detail": "budget of this run is spent"})),
    "serper": Spoken(
        _serper,
        lambda queries: {"searchParameters": {"q": queries[0]}, "organic": _results(queries, text="snippet"), "credits": 1},
        (400, {"message": "Not enough credits", "statusCode": 400}),
    ),
    "brightdata": Spoken(
        _brightdata,
        lambda queries: {
            "general": {"query": queries[0]},
            **({"organic": found} if (found := _results(queries, text="description")) else {}),
        },
        (400, "Account is suspended"),
    ),
    "azure_bing": Spoken(
        _azure_bing,
        lambda queries: {
            "_type": "SearchResponse",
            **({"webPages": {"value": found}} if (found := _results(queries, title="name", link="url", text="snippet")) else {}),
        },
        (403, {"error": {"code": "403", "message": "Out of call volume quota. Quota will be replenished in 10 days."}}),
    ),
    "serpapi": Spoken(_serpapi, _serpapi_answer, (429, {"error": "Your account has run out of searches."})),
    "google_cse": Spoken(
        _google_cse,
        lambda queries: {"kind": "customsearch#search", **({"items": found} if (found := _results(queries, text="snippet")) else {})},
        (429, {"error": {"code": 429, "message": "Quota exceeded for 'Queries per day'", "errors": [{"reason": "rateLimitExceeded"}]}}),
    ),
    "tavily": Spoken(
        _tavily,
        lambda queries: {"query": queries[0], "results": _results(queries, link="url", text="content"), "response_time": 0.1},
        (432, {"detail": {"error": "This request exceeds your plan's set usage limit."}}),
    ),
    "brave": Spoken(
        _brave,
        lambda queries: {
            "type": "search",
            **({"web": {"type": "search", "results": found}} if (found := _results(queries, link="url", text="description")) else {}),
        },
        (429, {"type": "ErrorResponse", "error": {"status": 429, "code": "QUOTA_LIMITED", "detail": "Monthly quota exceeded"}}),
    ),
}


def in_turn(*faults: str | None) -> Callable[[Asked], str | None]:
    """These faults one after the other, whatever is asked; the last one for ever."""
    numbers = itertools.count()
    return lambda asked: faults[min(next(numbers), len(faults) - 1)]
