"""Code of both servers: Search-R1's request, the port, refusals as JSON, metrics, and a shutdown that drops no request.

signal ──> the port closes ──> pending requests are answered, for `grace_s` at most ──> the app's own clean-up
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

from aiohttp import web
from pydantic import BaseModel, PositiveInt, Strict, ValidationError

from igpo_megatron.data.corpus import Passage, join_contents
from igpo_megatron.types import UserError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MOST_BYTES = 64 * 2**20
"""Size limit of a request; Search-R1's client sends the queries of a complete batch at once."""

RECENT = 4096
"""The quantiles are of this many latest requests."""


class Asked(BaseModel):
    """Body of POST /retrieve."""

    queries: list[str]
    topk: Annotated[PositiveInt, Strict()] | None = None
    """Passages per query, a whole number, which `true` is not; null takes the server's default."""

    return_scores: bool = False


async def read_request(request: web.Request) -> Asked:
    """The body, whatever its content type. Raises 422 in FastAPI's form for any other shape."""
    try:
        return Asked.model_validate_json(await request.read())
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise refusal(422, [{**problem, "loc": ["body", *problem["loc"]]} for problem in problems]) from None


def document(passage: Passage) -> dict[str, str]:
    """Search-R1's form of a passage."""
    return {"id": passage.doc_id, "contents": join_contents(passage)}


class _Refusal(web.HTTPException):
    """An HTTP error of any status; aiohttp lacks classes for some."""

    def __init__(self, status: int, **arguments: Any):
        self.status_code = status
        super().__init__(**arguments)


def refusal(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> web.HTTPException:
    """The error to raise for an answer of `status` with a JSON body that gives the reason."""
    text = web.json_response({"detail": detail}).text
    return _Refusal(status, text=text, content_type="application/json", headers=headers)


@dataclass
class Metrics:
    """Counts since the start and recent latencies, in Prometheus' text format."""

    prefix: str
    """First part of every name, e.g. `retriever`."""

    counts: Counter[str] = field(default_factory=Counter)
    """Name without prefix, labels included, e.g. `requests_total{status="200"}`."""

    in_flight: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    total_s: float = 0.0

    def watch(self, handler: Handler) -> Handler:
        """`handler`, with requests counted and timed."""

        async def watched(request: web.Request) -> web.StreamResponse:
            start = time.perf_counter()
            self.in_flight += 1
            status = 500
            try:
                response = await handler(request)
                status = response.status
                return response
            except web.HTTPException as error:
                status = error.status
                raise
            finally:
                self.in_flight -= 1
                self.latencies_s.append(time.perf_counter() - start)
                self.total_s += self.latencies_s[-1]
                self.counts[f'requests_total{{status="{status}"}}'] += 1

        return watched

    async def answer(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(text=self.render())

    def render(self) -> str:
        """One line per value. The quantiles are of the last 4,096 requests."""
        requests = sum(count for name, count in self.counts.items() if name.startswith("requests_total"))
        values: dict[str, float] = {
            **dict(sorted(self.counts.items())),
            "in_flight": self.in_flight,
            **{f'latency_seconds{{quantile="{share}"}}': quantile(self.latencies_s, share) for share in (0.5, 0.95, 0.99)},
            "latency_seconds_sum": round(self.total_s, 6),
            "latency_seconds_count": requests,
        }
        return "".join(f"{self.prefix}_{name} {value:g}\n" for name, value in values.items())


def quantile(values: deque[float], share: float) -> float:
    """The smallest value that a `share` of all values do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def addresses(host: str) -> list[str]:
    """Numeric addresses of a host to listen on. Raises UserError if it has none."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise UserError(f"--host {host} has no address ({error.strerror}); name one of this machine's, or 127.0.0.1") from None


def is_loopback(host: str) -> bool:
    """True if nobody outside this machine can reach a server that listens there."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses(host))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises UserError if the address is not available."""
    with ExitStack() as opened:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            advice = "choose another --port, or stop the program that uses it"
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; {advice}") from None
        opened.pop_all()
    return listener


def base_url(host: str, listener: socket.socket) -> str:
    """`http://host:port` of a listening socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def serve(app: web.Application, listener: socket.socket, *, stop: asyncio.Event, grace_s: float) -> None:
    """Answer until SIGINT, SIGTERM or `stop`, then end gracefully. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    # No access log: paths may contain run names, and a line per search is of no use.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=grace_s)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await runner.cleanup()
