"""Serve BM25, dense or hybrid search over a corpus with Search-R1's protocol.

igpo serve retriever --corpus FILE.jsonl --port 8000
igpo serve retriever --corpus FILE.jsonl --port 8000 --backend hybrid

POST /retrieve  {"queries": [str, ...], "topk": int or null, "return_scores": bool}
                -> {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}      with scores
                -> {"result": [[{"id", "contents"}, ...], ...]}                             without
GET  /health    -> {"status": "ok" or "loading", "passages": int or null}, always 200
GET  /ready     -> the same; 503 until the index is ready
GET  /metrics   -> Prometheus' text format

requests ── wait while a batch is being searched ──> one call of the index in a worker thread ──> answers

The index is kept in FILE.jsonl.index beside the corpus, under a name derived from its contents: an unchanged corpus is not indexed
again, a changed one is. When interrupted, the server answers pending requests and exits.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web
from prometheus_client import Counter
from rich.console import Console
from rich.progress import track

from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.local.bm25 import Bm25Index, Hits
from igpo_megatron.search.local.dense import DenseIndex, Embedding, open_dense
from igpo_megatron.search.local.hybrid import HybridIndex
from igpo_megatron.search.local.index_place import bm25_settings, digest, place
from igpo_megatron.search.settings import Search
from igpo_megatron.serve.http import MOST_BYTES, Metrics, base_url, document, listen, read_request, refusal, serve
from igpo_megatron.types import UserError

BATCH = 256
"""Queries per call of the index; more only if a single request has more."""

GRACE_S = 30

Find = Callable[[Sequence[str], int], list[Hits]]
"""(queries, k) -> hits per query. Called in one worker thread."""


class Backend(StrEnum):
    """What answers."""

    BM25 = "bm25"
    DENSE = "dense"
    HYBRID = "hybrid"


def open_index(corpus: Path, backend: Backend, embedding: Embedding | None = None, *, progress: bool) -> tuple[int, Find]:
    """(number of passages, search) of a corpus; its index is read from beside it, or made and stored there. Raises ValueError.

    `embedding`: of dense and hybrid search; None is that of the packaged encoder.
    """
    embedding = embedding or Embedding.of(None, "", "")
    passages = tuple(read_corpus(corpus) if not progress else _track(corpus))
    if backend is Backend.DENSE:
        return len(passages), _dense(corpus, passages, embedding).search
    words = Bm25Index(passages, folder=place(corpus, "bm25", digest(passages, *bm25_settings())), show_progress=progress)
    if backend is Backend.BM25:
        return len(passages), lambda queries, k: [words.search(query, k) for query in queries]
    return len(passages), HybridIndex(words, _dense(corpus, passages, embedding), Search().rrf_constant).search


def _dense(corpus: Path, passages: Sequence[Passage], embedding: Embedding) -> DenseIndex:
    return open_dense(passages, embedding, place(corpus, "dense", digest(passages, *astuple(embedding)) + ".npz"))


def _track(corpus: Path) -> Iterable[Passage]:
    """The passages, with a progress bar over the lines of the file, if it exists."""
    lines = 0
    if corpus.is_file():
        with corpus.open("rb") as file:
            while block := file.read(2**20):
                lines += block.count(b"\n")
    return track(read_corpus(corpus), description="reading the corpus", total=lines, transient=True, console=Console(stderr=True))


@dataclass(eq=False)
class Waiting:
    """One request that waits for the index."""

    queries: list[str]
    k: int
    found: asyncio.Future[list[Hits]]


@dataclass
class Batches:
    """Requests that arrive during a search wait, and are searched together in the next call."""

    find: Find
    searched: Counter
    """Counts the calls of `find`."""

    _waiting: deque[Waiting] = field(default_factory=deque)
    _searching: asyncio.Task[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="index"))

    async def get(self, queries: list[str], k: int) -> list[Hits]:
        """Hits per query."""
        waiting = Waiting(queries, k, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._searching is None or self._searching.done():
            self._searching = asyncio.create_task(self._search())
        return await waiting.found

    async def _search(self) -> None:
        while self._waiting:
            batch = self._next()
            self.searched.inc()
            call = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, batch)
            await asyncio.wait([call])
            error = call.exception()
            for number, waiting in enumerate(batch):
                if waiting.found.done():  # the client has given up
                    continue
                if error is None:
                    waiting.found.set_result(call.result()[number])
                else:
                    waiting.found.set_exception(error)

    def _next(self) -> list[Waiting]:
        """Requests of BATCH queries together, at least one, first come first served."""
        batch: list[Waiting] = []
        queries = 0
        while self._waiting and (not batch or queries + len(self._waiting[0].queries) <= BATCH):
            batch.append(self._waiting.popleft())
            queries += len(batch[-1].queries)
        return batch

    def _answer(self, batch: list[Waiting]) -> list[list[Hits]]:
        """Runs in the worker thread. A query that several requests share is searched once."""
        found: dict[tuple[str, int], Hits] = {}
        for k in {waiting.k for waiting in batch}:
            queries = list(dict.fromkeys(query for waiting in batch if waiting.k == k for query in waiting.queries))
            found |= {(query, k): hits for query, hits in zip(queries, self.find(queries, k), strict=True)}
        return [[found[query, waiting.k] for query in waiting.queries] for waiting in batch]


class Server:
    """The endpoints. Searches are refused until `ready` is called."""

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.passages: int | None = None
        self.metrics = Metrics("retriever")
        self._queries = self.metrics.counter("queries", "Queries of all requests.")
        self._searched = self.metrics.counter("batches", "Calls of the index, each with the queries that had come meanwhile.")
        self._batches: Batches | None = None

    def app(self) -> web.Application:
        """For aiohttp."""
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/retrieve", self.metrics.watch(self._retrieve))
        for path in ("/health", "/ready"):
            app.router.add_get(path, self._state)
        app.router.add_get("/metrics", self.metrics.answer)
        return app

    def ready(self, passages: int, find: Find) -> None:
        """Answer searches from now on."""
        self.passages = passages
        self._batches = Batches(find, self._searched)

    async def _retrieve(self, request: web.Request) -> web.Response:
        asked = await read_request(request)
        if self._batches is None:
            raise refusal(503, "the index is being made or read; GET /ready tells when it is ready", {"Retry-After": "2"})
        self._queries.inc(len(asked.queries))
        found = await self._batches.get(asked.queries, asked.topk or self.top_k)
        if asked.return_scores:
            return web.json_response({"result": [[{"document": document(p), "score": score} for p, score in hits] for hits in found]})
        return web.json_response({"result": [[document(passage) for passage, _ in hits] for hits in found]})

    async def _state(self, request: web.Request) -> web.Response:
        loading = self.passages is None
        state = {"status": "loading" if loading else "ok", "passages": self.passages}
        return web.json_response(state, status=503 if loading and request.path == "/ready" else 200)


async def run(server: Server, listener: socket.socket, load: Callable[[], tuple[int, Find]], announce: Callable[[], None]) -> None:
    """Serve while the index is loaded in the background. Raises what `load` raises."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(server.app(), listener, stop=stop, grace_s=GRACE_S))
    loading = in_daemon_thread(load)
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
    elif loading.exception() is not None:
        stop.set()
    else:
        server.ready(*loading.result())
        announce()
    await serving
    if loading.done() and not loading.cancelled():
        loading.result()


def in_daemon_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """What `work` returns or raises. Unlike other threads it does not delay the exit when a long build is interrupted."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled while the thread runs

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001 - raised where the future is waited for
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return asyncio.wrap_future(future)


def retriever(
    corpus: Annotated[Path, typer.Option(help="JSON lines of {id, title, text} or {id, contents}.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    top_k: Annotated[int, typer.Option(min=1, help="Passages per query where the request does not say.")] = 3,
    encoder: Annotated[str | None, typer.Option(help="sentence-transformers model of dense search, as in search.encoder.")] = None,
    query_prefix: Annotated[str, typer.Option(help="Put before a query where --encoder is given.")] = "query: ",
    passage_prefix: Annotated[str, typer.Option(help="Put before a passage where --encoder is given.")] = "passage: ",
    backend: Annotated[Backend | None, typer.Option(help="What answers; bm25 unless --encoder is given, then dense.")] = None,
) -> None:
    """Index a corpus, or read its index, and serve it until interrupted."""
    if backend is Backend.BM25 and encoder is not None:
        raise UserError("--backend bm25 encodes nothing; leave out --encoder, or use --backend dense or hybrid")
    # The port is opened before the corpus is read: a large index takes minutes, and a busy port should be reported at once.
    listener = listen(host, port)
    backend = backend or (Backend.BM25 if encoder is None else Backend.DENSE)
    embedding = Embedding.of(encoder, query_prefix, passage_prefix)
    server = Server(top_k)

    def announce() -> None:
        typer.echo(f"serving {server.passages} passages on {base_url(host, listener)}/retrieve")

    try:
        asyncio.run(run(server, listener, lambda: open_index(corpus, backend, embedding, progress=sys.stderr.isatty()), announce))
    except (UserError, OSError) as error:
        raise UserError(str(error) if str(corpus) in str(error) else f"{corpus}: {error}") from None
