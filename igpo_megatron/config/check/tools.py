"""Search and the other tools have what they need, besides what their registries know of each."""

from __future__ import annotations

import os
from collections.abc import Iterator

from igpo_megatron.config.check.common import needs_engines
from igpo_megatron.config.schema import Config


def check_search(config: Config) -> Iterator[str]:
    """Search has its record and time."""
    search = config.search
    if not needs_engines(config):
        return
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


def check_tools(config: Config) -> Iterator[str]:
    """Tools beside search have what they need."""
    rollout, visit = config.rollout, config.visit
    if not needs_engines(config):
        return
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
