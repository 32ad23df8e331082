"""Code of both servers: Search-R1's request, the port, refusals as JSON, metrics, and a shutdown that drops no request.

signal ──> the port closes ──> pending requests are answered, for `grace_s` at most ──> the app's own clean-up
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from typing import Annotated, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from pydantic import BaseModel, PositiveInt, Strict, ValidationError

from igpo_megatron.data.corpus import Passage, join_contents
from igpo_megatron.types import UserError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MOST_BYTES = 64 * 2**20
"""Size limit of a request; Search-R1's client sends the queries of a complete batch at once."""

disable_created_metrics()  # no second line per counter that tells when it was made


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


class Metrics:
    """What Prometheus may ask of a server, under names that begin with `prefix`: requests by status, those in flight, their latency."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._registry = prefix, CollectorRegistry()
        self._requests = self.counter("requests", "Answered requests.", "status")
        self._in_flight = self.gauge("in_flight", "Requests being answered.")
        self._latency = Histogram("latency_seconds", "Seconds until the answer.", namespace=prefix, registry=self._registry)

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """A count since the start, shown as `PREFIX_NAME_total`."""
        return Counter(name, meaning, labels, namespace=self._prefix, registry=self._registry)

    def gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        """A value that is set, shown as `PREFIX_NAME`."""
        return Gauge(name, meaning, labels, namespace=self._prefix, registry=self._registry)

    def watch(self, handler: Handler) -> Handler:
        """`handler`, with requests counted and timed."""

        async def watched(request: web.Request) -> web.StreamResponse:
            status = 500
            with self._in_flight.track_inprogress(), self._latency.time():
                try:
                    response = await handler(request)
                    status = response.status
                    return response
                except web.HTTPException as error:
                    status = error.status
                    raise
                finally:
                    self._requests.labels(status).inc()

        return watched

    async def answer(self, request: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


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


async def serve(
    app: web.Application, listener: socket.socket, *, stop: asyncio.Event, grace_s: float, announce: Callable[[], None] = lambda: None
) -> None:
    """Answer until SIGINT, SIGTERM or `stop`, then end gracefully. A second signal ends the process at once.

    `announce` is called once signals are heeded.
    """
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    # No access log: paths may contain run names, and a line per search is of no use.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=grace_s)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
        announce()
        await stop.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        await runner.cleanup()
