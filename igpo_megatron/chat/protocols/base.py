"""The parts of every protocol. Protocols parse only text that the policy wrote itself, never a tool result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from igpo_megatron.tools.base import HIT, Description
from igpo_megatron.tools.registry import TOOLS
from igpo_megatron.types import SEARCH, ToolCall, renamed


@dataclass(frozen=True, slots=True)
class Answer:
    """The policy answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """The policy wrote neither a tool call nor an answer."""

    reason: str


Action = ToolCall | Answer | Malformed

ALL_TAGS = ("think", "tool_call", "tool_response", "answer", "code", "search", "visit", "python", "information", "result")
"""Tags of all protocols."""


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools that a policy may call."""

    search: str = SEARCH
    """The policy's name of the search tool, e.g. `web_search`; tag protocols always use `search`."""

    max_queries: int = 3
    """Most queries per search; further ones are dropped."""

    extra: tuple[Description, ...] = ()
    """The tools besides search."""

    def renamed(self, name: str) -> str:
        """A tool's name translated from the policy's to ours, or back."""
        return renamed(name, self.search)

    def named(self, name: str) -> Description | None:
        """The tool of that name; None for search and unknown names."""
        return next((tool for tool in self.extra if tool.name == name), None)


BUILT_IN = ToolSet(extra=tuple(entry.description for entry in TOOLS.values()))
"""All built-in tools."""


class Write(Protocol):
    """Signature of `ToolProtocol.write`."""

    def __call__(self, thought: str, action: ToolCall | Answer, tools: ToolSet = BUILT_IN) -> str:
        """The turn that `parse` reads as that action. Raises ValueError if a text contains a tag that would end it early."""
        ...


@dataclass(frozen=True, slots=True)
class ToolProtocol:
    """One way to write calls and answers, and to show results."""

    parse: Callable[[str, ToolSet], Action]
    """The action of a turn. The text may be anything, and includes a forced opening; never raises. Calls use our names of tools."""

    write: Write
    """The inverse, for demonstrations and checks."""

    final_answer: Callable[[Sequence[str]], str | None]
    """All turns of a trajectory -> the answer that is scored; None if the format check fails."""

    tool_messages: bool = True
    """True: the chat template describes the tools and frames results as messages of its tool role, so a call ends with the end-of-turn
    token. False: the conversation is a single assistant message, and results are inserted between the texts of `result`."""

    instructions: Callable[[ToolSet], str] | None = None
    """Describes the tools if the template does not."""

    instructions_in: Literal["system", "user"] = "system"
    """The message with the instructions; in the user's, the question follows them."""

    stop: tuple[str, ...] = ()
    """Strings, besides the end-of-turn token, that end a turn; they stay in the text."""

    call_tags: bool = False
    """A call is the text between tags named after its tool and ends the turn, so users' tools add their closing tags to `stop`."""

    result: tuple[str, str] = ("", "")
    """Texts before and after a result that is not a message of its own."""

    hit: str = HIT
    """Format of a passage of a search result: rank (from 1), title, text."""


def balanced(text: str, tags: Sequence[str]) -> bool:
    """True if every tag opens as often as it closes and every opening has a closing after it."""
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != text.count(closing) or text.rfind(opening) > text.rfind(closing):
            return False
    return True


def between(text: str, tag: str) -> Iterator[str]:
    """The text between each opening tag and the next closing one, as found by a lazy regular expression.

    For a text of openings alone that expression takes quadratic time, this function linear time.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = 0
    while (start := text.find(opening, end)) >= 0 and (stop := text.find(closing, start + len(opening))) >= 0:
        yield text[start + len(opening) : stop]
        end = stop + len(closing)
