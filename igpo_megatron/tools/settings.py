"""Settings of the tools besides search."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section


class Summary(Section):
    """A model that summarises visited pages, at any server that speaks OpenAI's POST /v1/chat/completions."""

    url: str | None = None
    """Address up to the version, such as http://127.0.0.1:8001/v1; null shows the page's own text."""

    model: str | None = None
    """The model's name at that server."""

    api_key_env: str | None = None
    """Environment variable that holds the server's key, sent as a bearer token; null if it needs none."""

    max_tokens: PositiveInt = 1024
    """Tokens of a summary, reasoning included."""

    timeout_s: PositiveFloat = 120
    """Deadline of one attempt."""

    attempts: PositiveInt = 3
    """Tries per page, with exponential back-off."""

    max_concurrency: PositiveInt = 16
    """Requests in flight at once."""

    def problems(self) -> Iterator[str]:
        if self.url is None:
            return
        if not self.url.startswith(("http://", "https://")):
            yield f"visit.summary.url={self.url!r}: expected an address such as http://127.0.0.1:8001/v1"
        if self.model is None:
            yield "visit.summary.url needs visit.summary.model, the model's name at that server"
        if self.api_key_env is not None and not os.environ.get(self.api_key_env, "").strip():
            yield f"visit.summary.api_key_env={self.api_key_env}: that environment variable is not set; export it, or set it to null"


class Visit(Section):
    """The visit tool (`rollout.extra_tools`): reads web pages, HTML, PDF and plain text."""

    allow_hosts: tuple[str, ...] = ()
    """Host names (or addresses, as written in a URL) that may be visited although their address is private, loopback or link-local."""

    content: Literal["matching", "start"] = "matching"
    """`matching`: of a long page, the passages that match the goal of the visit best (BM25); `start`: its beginning."""

    max_tokens: PositiveInt = 2048
    """Tokens of a page's text that are shown, or sent to the summariser."""

    show_failures: bool = False
    """True tells the policy that a site could not be reached or took too long; false ends the trajectory in TOOL_FAILED. Pages that do not
    exist or may not be visited are always reported to it."""

    timeout_s: PositiveFloat = 20
    """Deadline of one attempt, redirects included."""

    attempts: PositiveInt = 2
    """Tries per page, with exponential back-off, as long as the failure may be temporary."""

    max_page_kib: PositiveInt = 8192
    """Larger pages are not read."""

    max_redirects: NonNegativeInt = 5
    """Redirects followed; each is checked as the first address is."""

    extract_timeout_s: PositiveFloat = 30
    """Deadline of extracting the text of a page."""

    workers: PositiveInt = 2
    """Processes that extract text from pages."""

    max_concurrency: PositiveInt = 32
    """Visits at once."""

    user_agent: str = "igpo_megatron"
    """User-Agent header sent to sites."""

    summary: Summary = Summary()
    """The summariser."""

    def problems(self) -> Iterator[str]:
        for host in self.allow_hosts:
            if "/" in host or (host.rpartition(":")[2].isdigit() and host.count(":") == 1):
                yield f"visit.allow_hosts: {host!r}: expected a host's name alone, such as wiki.example.org, without http:// and port"


class Python(Section):
    """The python tool (`rollout.extra_tools`): code in a process of its own; igpo_megatron/tools/python/tool.py says what is isolated."""

    allow_network: bool = False
    """Leave the network to the code, and run even if it cannot be isolated. False refuses to start without isolation."""

    timeout_s: PositiveFloat = 30
    """Wall time of one call; CPU time of each of its processes, too."""

    max_memory_mib: PositiveInt = 1024
    """Address space of each process."""

    max_file_mib: PositiveInt = 64
    """All files of a call together; each single file if the scratch folder cannot be in memory."""

    max_processes: PositiveInt = 32
    """Processes and threads of a call."""

    max_output_kib: PositiveInt = 64
    """Output of a call that is kept; the policy sees at most `rollout.max_observation_tokens` of it."""

    max_concurrency: PositiveInt = 8
    """Calls that run at once."""
