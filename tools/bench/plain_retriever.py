"""The retriever as it is usually written (Search-R1's form): FastAPI, a plain function, one search after the other in a thread per request.

    python tools/bench/plain_retriever.py --corpus FILE.jsonl --port PORT

It reads the index that `igpo serve retriever` keeps beside the corpus; tools/bench/search.py compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI

from igpo_megatron.serve.http import Asked, base_url, document, listen
from igpo_megatron.serve.retriever import Backend, open_index


def main(
    corpus: Annotated[Path, typer.Option(help="JSON lines of passages.")],
    port: Annotated[int, typer.Option(help="0 takes a free one.")],
) -> None:
    """Serve until ended."""
    passages, find = open_index(corpus, Backend.BM25, progress=False)
    app = FastAPI()

    @app.post("/retrieve")
    def retrieve(asked: Asked) -> dict[str, Any]:
        found = [find([query], asked.topk or 3)[0] for query in asked.queries]
        return {"result": [[{"document": document(passage), "score": score} for passage, score in hits] for hits in found]}

    listener = listen("127.0.0.1", port)
    typer.echo(f"serving {passages} passages on {base_url('127.0.0.1', listener)}/retrieve")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    typer.run(main)
