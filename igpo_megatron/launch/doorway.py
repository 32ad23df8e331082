"""The network between the launchers: node 0's HTTP server, and the other nodes' way to it. Both sides prove the secret (seal.py).

The server listens on the address by which the nodes reach node 0. A client that has not proved the secret gets only a challenge or a
refusal, may send at most one message's length, and is disconnected after a few seconds; of too many the oldest goes first.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from igpo_megatron.launch.messages import MAX_MESSAGE, Answer, BadMessage, Greeting, Hello, Said, Sealed, clean_sentence, read, write
from igpo_megatron.launch.seal import Challenges, is_mac, mac, new_nonce, session_key

STRANGER_S = 5.0
"""A connection that has not proved the secret is closed after this time."""

MAX_STRANGERS = 64
REQUEST_S = 5.0
MAX_NAMED = 4
"""At most so many addresses of strangers appear in a message."""

_SWEEP_S = 0.5
_SESSIONS_PER_NODE = 64
_PROOF, _NODE, _HEAD = "proof of node 0", "node", "node 0"

_silent = logging.getLogger(f"{__name__}.server")  # strangers must not fill a log
_silent.disabled = True


class Unanswered(Exception):
    """Node 0 did not answer, or something else did, or the answer was tampered with: ask again."""


class WrongSecret(Exception):
    """The server does not know this node's secret."""


class Doorway:
    """Node 0's server. `hear` gets the messages of nodes that have proved the secret."""

    def __init__(self, key: bytes, nodes: int, hear: Callable[[Said], Answer]) -> None:
        self._key, self._hear = key, hear
        self._challenges = Challenges()
        self._numbers: dict[str, int] = {}
        """Challenge of a session -> number of its last message."""

        self._max_sessions = _SESSIONS_PER_NODE * nodes
        self._proved: set[Any] = set()
        self._since: dict[Any, float] = {}
        self.strangers: set[str] = set()
        """Addresses that asked for a challenge and have not answered it."""

    @asynccontextmanager
    async def open(self, listener: socket.socket) -> AsyncIterator[None]:
        """Serve on a listening socket."""
        app = web.Application(client_max_size=MAX_MESSAGE)
        app.add_routes([web.post("/hello", self._greet), web.post("/say", self._listen)])
        runner = web.AppRunner(app, access_log=None, logger=_silent, auto_decompress=False, shutdown_timeout=0.2, lingering_time=0)
        asyncio.get_running_loop().set_exception_handler(_note)
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
        sweeper = asyncio.create_task(self._sweep(runner))
        try:
            yield
        finally:
            sweeper.cancel()
            await runner.cleanup()

    async def _greet(self, request: web.Request) -> web.Response:
        hello = await _received(Hello, request)
        if len(self.strangers) < MAX_NAMED and request.remote:
            self.strangers.add(request.remote)
        challenge = self._challenges.make(hello.nonce)
        return web.Response(text=write(Greeting(challenge, mac(self._key, _PROOF, hello.nonce, challenge))))

    async def _listen(self, request: web.Request) -> web.Response:
        sealed = await _received(Sealed, request)
        session = session_key(self._key, sealed.nonce, sealed.challenge)
        if not self._challenges.made(sealed.challenge, sealed.nonce):
            raise web.HTTPForbidden(text="not a challenge of this job")
        if not is_mac(sealed.seal, session, _NODE, str(sealed.number), sealed.body):
            raise web.HTTPForbidden(text="the seal does not prove the secret of this job")
        last = self._numbers.get(sealed.challenge)
        if last is None and len(self._numbers) >= self._max_sessions:
            raise web.HTTPForbidden(text="too many sessions")
        if last is not None and sealed.number <= last:
            raise web.HTTPForbidden(text="repeated message number")
        self._numbers[sealed.challenge] = sealed.number
        self._proved.add(request.protocol)
        self.strangers.discard(request.remote or "")
        try:
            answer = self._hear(read(Said, sealed.body))
        except BadMessage as problem:
            answer = Answer(refused=f"node 0 cannot read what this node says ({problem}): run the same version on every node")
        body = write(answer)
        seal = mac(session, _HEAD, str(sealed.number), body)
        return web.Response(text=write(Sealed(sealed.nonce, sealed.challenge, sealed.number, body, seal)))

    async def _sweep(self, runner: web.AppRunner) -> None:
        """Disconnect strangers that stay too long, or are too many."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            here = runner.server.connections if runner.server else []
            self._proved &= set(here)
            self._since = {one: self._since.get(one, now) for one in here if one not in self._proved}
            oldest = sorted(self._since, key=self._since.__getitem__)
            for place, connection in enumerate(oldest):
                if now - self._since[connection] > STRANGER_S or place < len(oldest) - MAX_STRANGERS:
                    connection.force_close()


def _note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle errors outside handlers: OSErrors, such as too many open files, come from strangers, and asyncio retries after them."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


async def _received(kind: type[Any], request: web.Request) -> Any:
    """The message in a request; refused if it is too long, too slow or malformed."""
    try:
        async with asyncio.timeout(REQUEST_S):
            return read(kind, await request.read())
    except BadMessage as problem:
        raise web.HTTPBadRequest(text=str(problem)) from None
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


@asynccontextmanager
async def line(key: bytes, head: str, port: int, nodes: int) -> AsyncIterator[Line]:
    """A node's way to node 0."""
    # One connection, and no proxy: the environment's proxy is for outside addresses.
    connector, timeout = aiohttp.TCPConnector(limit=1), aiohttp.ClientTimeout(total=REQUEST_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False, auto_decompress=False) as http:
        yield Line(key, http, f"http://{head}:{port}", MAX_MESSAGE + nodes * 4096)


class Line:
    """What `line` opens."""

    def __init__(self, key: bytes, http: aiohttp.ClientSession, place: str, max_answer: int) -> None:
        self._key, self._http, self._place, self._max_answer = key, http, place, max_answer
        self._numbers = itertools.count()
        self._greeted: tuple[str, str] | None = None
        """Nonce and challenge of the session; None before it, and after node 0 has forgotten it."""

    async def ask(self, said: Said) -> Answer:
        """Send a message and return the answer. Raises Unanswered, WrongSecret."""
        if self._greeted is None:
            self._greeted = await self._greet()
        nonce, challenge = self._greeted
        session, number, body = session_key(self._key, nonce, challenge), next(self._numbers), write(said)
        seal = mac(session, _NODE, str(number), body)
        answer: Sealed = await self._post("say", Sealed(nonce, challenge, number, body, seal), Sealed)
        if (answer.number, answer.nonce) != (number, nonce) or not is_mac(answer.seal, session, _HEAD, str(number), answer.body):
            raise Unanswered("the answer has no seal of node 0")
        return self._read(Answer, answer.body)

    async def _greet(self) -> tuple[str, str]:
        nonce = new_nonce()
        greeting: Greeting = await self._post("hello", Hello(nonce), Greeting)
        if not is_mac(greeting.proof, self._key, _PROOF, nonce, greeting.challenge):
            raise WrongSecret
        return nonce, greeting.challenge

    async def _post(self, path: str, message: Any, kind: type[Any]) -> Any:
        try:
            async with self._http.post(f"{self._place}/{path}", data=write(message).encode(), allow_redirects=False) as response:
                if response.status == 403:  # node 0's launcher was restarted and does not know this session
                    self._greeted = None
                text = bytearray()
                async for part in response.content.iter_chunked(2**16):
                    text += part
                    if len(text) > self._max_answer:
                        raise Unanswered("the answer is too long")
                if response.status != 200:
                    raise Unanswered(clean_sentence(f"HTTP status {response.status}"))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise Unanswered(type(error).__name__) from None
        return self._read(kind, bytes(text))

    @staticmethod
    def _read(kind: type[Any], text: str | bytes) -> Any:
        try:
            return read(kind, text)
        except BadMessage as problem:
            raise Unanswered(str(problem)) from None
