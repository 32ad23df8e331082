"""What every tool is, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Tool(Protocol):
    """Anything beside search that the policy can call. Used from one event loop; a call may be cancelled at any point."""

    async def use(self, arguments: Sequence[str]) -> Observed:
        """What a call with these arguments (`ToolCall.queries`) shows. Trouble is a sentence or a failure.

        SearchStopped where only a person can help: a replay without the call.
        """
        ...

    async def close(self) -> None:
        """Give back what is held. The tool is not used afterwards."""
        ...
