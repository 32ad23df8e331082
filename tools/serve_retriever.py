"""Serve BM25 search over a corpus with Search-R1's protocol.

python tools/serve_retriever.py --corpus FILE.jsonl --port 8000

POST /retrieve  {"queries": [str, ...], "topk": int or null, "return_scores": bool}
                -> {"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}      with scores
                -> {"result": [[{"id", "contents"}, ...], ...]}                             without
GET  /health    -> {"status": "ok", "passages": int}
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, PositiveInt

from igpo_megatron.data.corpus import join_contents, read_corpus
from igpo_megatron.search.bm25 import Bm25Index


class Request(BaseModel):
    """Body of POST /retrieve."""

    queries: list[str]
    topk: PositiveInt | None = None
    """Passages per query; null takes the server's --top-k."""

    return_scores: bool = False


def build_app(index: Bm25Index, top_k: int) -> FastAPI:
    """The two endpoints over an index."""
    app = FastAPI(title="BM25 retriever", docs_url=None, redoc_url=None, openapi_url=None)

    # Plain functions: FastAPI runs them in threads, so a long search does not hold up /health.
    @app.post("/retrieve")
    def retrieve(request: Request) -> dict[str, Any]:
        k = top_k if request.topk is None else request.topk
        result = []
        for query in request.queries:
            hits = [({"id": passage.doc_id, "contents": join_contents(passage)}, score) for passage, score in index.search(query, k)]
            result.append(
                [{"document": document, "score": score} for document, score in hits]
                if request.return_scores
                else [document for document, _ in hits]
            )
        return {"result": result}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "passages": len(index.passages)}

    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. OSError where the address cannot be had."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def main(
    corpus: Annotated[Path, typer.Option(help="JSON lines of {id, title, text} or {id, contents}.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    top_k: Annotated[int, typer.Option(min=1, help="Passages per query where the request does not say.")] = 3,
) -> None:
    """Index a corpus and serve it until interrupted."""
    # The port is taken before the corpus is read: a large index takes minutes, and the mistake should show at once.
    try:
        listener = listen(host, port)
    except OSError as error:
        raise _stop(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or stop the program that uses it") from None
    try:
        index = Bm25Index(read_corpus(corpus))
    except ValueError as error:
        raise _stop(str(error) if str(corpus) in str(error) else f"{corpus}: {error}") from None
    typer.echo(f"serving {len(index.passages)} passages on http://{host}:{listener.getsockname()[1]}/retrieve")
    uvicorn.Server(uvicorn.Config(build_app(index, top_k), log_level="warning")).run(sockets=[listener])


def _stop(message: str) -> typer.Exit:
    typer.echo(f"serve_retriever: {message}", err=True)
    return typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
