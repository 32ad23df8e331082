"""What every tool is, what the policy is told of it, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from igpo_megatron.search.results import SearchResult

HIT = "({rank}) {text}"
"""How IGPO shows a passage: rank (from 1), title, text."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the policy is told of a tool."""

    name: str
    purpose: str
    """A sentence."""

    arguments: Mapping[str, str]
    """Argument -> what it is, in the order of `ToolCall.queries`. All are text, and the first is required."""

    tag: tuple[str, str] | None = None
    """(what stands between the tags of a call, what the tool does), for protocols of tags; None takes it from the fields above."""

    verbatim: bool = False
    """The only argument keeps its spaces: the first line of code may be indented for a reason."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a tool gives back to the agent loop."""

    text: str
    """For the policy to read."""

    failure: str | None = None
    """One sentence if the tool failed for reasons outside the policy; `text` is then shown to nobody."""

    status: str = "ok"
    """How the call ended in the tool's own words (PageStatus, PythonStatus), for counting."""

    cached: bool = False
    """Answered by the store of search/cache.py; nobody was asked."""

    results: tuple[SearchResult, ...] = ()
    """Of a search, one per query: each is counted, instead of the call."""


class Tool(Protocol):
    """Anything that the policy can call. Used from one event loop; a call may be cancelled at any point."""

    async def use(self, arguments: Sequence[str]) -> Observed:
        """What a call with these arguments (`ToolCall.queries`) shows. Trouble is a sentence or a failure.

        SearchStopped where only a person can help: a refused key, a replay without the call.
        """
        ...

    async def close(self) -> None:
        """Give back what is held. The tool is not used afterwards."""
        ...
