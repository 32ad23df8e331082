"""Search and the other tools have what they need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

from igpo_megatron.config.check.common import needs_engines
from igpo_megatron.config.schema import Config
from igpo_megatron.search.settings import Search

MOST_RESULTS = {"azure_bing": 50, "google_cse": 10, "tavily": 20, "brave": 20}
"""Results that a web API gives per query at most."""


def check_search(config: Config) -> Iterator[str]:
    """Search has its provider, record and time."""
    search = config.search
    if not needs_engines(config):
        return
    yield from _search_backend(search)
    if search.mode in ("record", "replay") and search.cache is None:
        yield f"search.mode={search.mode} needs search.cache, the SQLite file of recorded answers"
    if search.mode == "replay" and search.cache is not None and not search.cache.is_file():
        yield f"search.cache={search.cache}: no such file; search.mode=replay needs a record, made with search.mode=record"
    if search.deadline_s < search.timeout_s:
        yield f"search.deadline_s={search.deadline_s:g} is less than one attempt (search.timeout_s={search.timeout_s:g}); raise it"
    if search.deadline_s > config.rollout.deadline_s:
        yield (
            f"search.deadline_s={search.deadline_s:g} is more than a whole trajectory has (rollout.deadline_s="
            f"{config.rollout.deadline_s:g}); lower it, or raise rollout.deadline_s"
        )


def _search_backend(search: Search) -> Iterator[str]:
    """What the chosen back-end needs. A replay asks no provider, so it needs no key."""
    match search.backend:
        case "bm25" | "dense" if search.corpus is None:
            yield f"search.backend={search.backend} needs search.corpus, a file of JSON lines {{id, title, text}}"
        case "bm25" | "dense" if search.corpus is not None and not search.corpus.is_file():
            yield f"search.corpus={search.corpus}: no such file; expected JSON lines {{id, title, text}}"
        case "retriever" if not (search.url or "").startswith(("http://", "https://")):
            yield f"search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve; found {search.url!r}"
        case "azure_bing" if search.url is None:
            yield "search.backend=azure_bing needs search.url: Microsoft retired Bing Search v7; name a server that speaks its format"
        case "brightdata" if search.zone is None:
            yield "search.backend=brightdata needs search.zone, the name of your SERP zone"
        case "google_cse" if search.engine_id is None:
            yield "search.backend=google_cse needs search.engine_id, the cx of your programmable search engine"
    if search.backend == "dense" and search.encoder is None:
        yield "search.backend=dense needs search.encoder, a sentence-transformers model such as intfloat/e5-base-v2"
    if search.backend == "dense" and search.mode != "replay" and find_spec("sentence_transformers") is None:
        yield "search.backend=dense needs sentence-transformers, which is not installed; install igpo-megatron[dense]"
    if search.url is not None and search.backend != "retriever" and not search.url.startswith(("http://", "https://")):
        yield f"search.url={search.url!r}: expected an address that begins with http:// or https://"
    if "@" in (search.url or "").partition("://")[2].partition("/")[0]:
        yield "search.url holds a user name or password; addresses are logged, so name its variable by search.api_key_env instead"
    most = MOST_RESULTS.get(search.backend, search.top_k)
    if search.top_k > most:
        yield f"search.top_k={search.top_k}: {search.backend} gives at most {most} results per query; use {most}"
    variable = search.key_variable
    if search.mode == "replay" or variable is None or os.environ.get(variable):
        return
    if search.api_key_env is None:
        yield f"search.backend={search.backend} needs a key in {variable}: that environment variable is not set; export it"
    else:
        yield f"search.api_key_env={variable}: that environment variable is not set; export it, or set search.api_key_env=null"


def check_tools(config: Config) -> Iterator[str]:
    """Tools beside search have what they need."""
    rollout, visit = config.rollout, config.visit
    if not needs_engines(config):
        return
    if rollout.tool_name in ("visit", "python"):
        yield f"rollout.tool_name={rollout.tool_name} is the name of another tool; search needs one of its own, such as search"
    if len(set(rollout.extra_tools)) < len(rollout.extra_tools):
        yield f"rollout.extra_tools={list(rollout.extra_tools)} names a tool more than once; name each once"
    if "visit" not in rollout.extra_tools:
        return
    if visit.max_tokens > rollout.max_observation_tokens and visit.summary.url is None:
        yield (
            f"visit.max_tokens={visit.max_tokens} is more than rollout.max_observation_tokens={rollout.max_observation_tokens}, "
            "so the end of what was chosen from a page would be cut off; lower the first or raise the second"
        )
    for host in visit.allow_hosts:
        if "/" in host or (host.rpartition(":")[2].isdigit() and host.count(":") == 1):
            yield f"visit.allow_hosts: {host!r}: expected a host's name alone, such as wiki.example.org, without http:// and port"
    summary = visit.summary
    if summary.url is not None and not summary.url.startswith(("http://", "https://")):
        yield f"visit.summary.url={summary.url!r}: expected an address such as http://127.0.0.1:8001/v1"
    if summary.url is not None and summary.model is None:
        yield "visit.summary.url needs visit.summary.model, the model's name at that server"
    if summary.url is not None and summary.api_key_env is not None and not os.environ.get(summary.api_key_env):
        yield f"visit.summary.api_key_env={summary.api_key_env}: that environment variable is not set; export it, or set it to null"
