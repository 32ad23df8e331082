"""`igpo serve`: one command for each server."""

from __future__ import annotations

import typer

from igpo_megatron.serve.retriever import retriever
from igpo_megatron.serve.search import search

app = typer.Typer(no_args_is_help=True, help="Serve a corpus or a paid search API to runs, until interrupted.")
app.command("retriever", epilog="Example: igpo serve retriever --corpus data/wiki-18.jsonl --port 8000")(retriever)
app.command("search", epilog="Example: igpo serve search --port 8001 --cache c.sqlite --budget 20000 backend=serper")(search)
