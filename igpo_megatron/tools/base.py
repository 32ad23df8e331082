"""The interface of tools, their descriptions for the policy, and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from igpo_megatron.search.results import SearchResult

HIT = "({rank}) {text}"
"""How IGPO shows a passage: rank (from 1), title, text."""


@dataclass(frozen=True, slots=True)
class Description:
    """A tool as it is described to the policy."""

    name: str
    purpose: str
    """A sentence."""

    arguments: Mapping[str, str]
    """Argument -> description, in the order of `ToolCall.queries`. All are text, and the first is required."""

    tag: tuple[str, str] | None = None
    """(content of a call's tags, what the tool does), for tag protocols; None takes both from the fields above."""

    verbatim: bool = False
    """The only argument keeps its leading spaces, as indented code needs."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The result of a tool call."""

    text: str
    """For the policy to read."""

    failure: str | None = None
    """One sentence if the tool failed for reasons outside the policy; `text` is then not shown."""

    status: str = "ok"
    """The tool's own status of the call (PageStatus, PythonStatus), for counting."""

    cached: bool = False
    """Answered from the store of search/cache.py."""

    results: tuple[SearchResult, ...] = ()
    """For a search, one per query; these are counted instead of the call."""


class Tool(Protocol):
    """A tool that the policy can call. Used from one event loop; a call may be cancelled at any point."""

    async def use(self, arguments: Sequence[str]) -> Observed:
        """The result of a call with these arguments (`ToolCall.queries`). Problems become text or a failure.

        Raises SearchStopped if only a person can help: a refused key, a replay without the call.
        """
        ...

    async def close(self) -> None:
        """Release resources. The tool is not used afterwards."""
        ...
