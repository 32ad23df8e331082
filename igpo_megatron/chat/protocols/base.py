"""What every protocol is made of. Protocols see text that the policy wrote itself, and nothing else: a tool result is never parsed."""

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
"""Tags of all protocols: what a policy may write, and what its format check judges."""


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools that a policy may call."""

    search: str = SEARCH
    """What the policy calls search, e.g. `web_search`; tags of tagged protocols are always `search`."""

    max_queries: int = 3
    """Queries of one search that are used; further ones are dropped."""

    extra: tuple[Description, ...] = ()
    """The others."""

    def renamed(self, name: str) -> str:
        """A tool's name from the policy's spelling to ours, or back."""
        return renamed(name, self.search)

    def named(self, name: str) -> Description | None:
        """The tool of that name; None for search and where there is none."""
        return next((tool for tool in self.extra if tool.name == name), None)


BUILT_IN = ToolSet(extra=tuple(entry.description for entry in TOOLS.values()))
"""All tools of ours."""


class Write(Protocol):
    """How a turn is written."""

    def __call__(self, thought: str, action: ToolCall | Answer, tools: ToolSet = BUILT_IN) -> str:
        """The turn that `parse` reads as that action. Raises ValueError where a text holds the very tag that would end it."""
        ...


@dataclass(frozen=True, slots=True)
class ToolProtocol:
    """One way to write calls and answers, and to show results."""

    parse: Callable[[str, ToolSet], Action]
    """What a turn asks for, whatever its text, which includes a forced opening; never raises. Calls have our names of tools."""

    write: Write
    """The inverse, for demonstrations and checks."""

    final_answer: Callable[[Sequence[str]], str | None]
    """All turns of a trajectory -> the answer that is scored; None where the format check fails."""

    tool_messages: bool = True
    """True: the chat template describes the tools and frames results as messages of its tool role, so a call ends with the end-of-turn
    token. False: the whole conversation is one message of the assistant, and results stand in it between the texts of `result`."""

    instructions: Callable[[ToolSet], str] | None = None
    """Describes the tools where the template does not."""

    instructions_in: Literal["system", "user"] = "system"
    """The message that holds the instructions; in the user's, the question follows them."""

    stop: tuple[str, ...] = ()
    """Strings that end a turn besides the end-of-turn token; they stay in the text."""

    call_tags: bool = False
    """A call is the text between tags of its tool's name and ends the turn, so tools of the user's add their closing tags to `stop`."""

    result: tuple[str, str] = ("", "")
    """Texts before and after a result, where it is no message of its own."""

    hit: str = HIT
    """One passage of a search result: rank (from 1), title, text."""


def balanced(text: str, tags: Sequence[str]) -> bool:
    """True if every tag opens as often as it closes and every opening has a closing after it."""
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != text.count(closing) or text.rfind(opening) > text.rfind(closing):
            return False
    return True


def between(text: str, tag: str) -> Iterator[str]:
    """What stands between each opening tag and the first closing one behind it, as a lazy regular expression finds it.

    A text of openings alone costs that expression the square of its length, this the length.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = 0
    while (start := text.find(opening, end)) >= 0 and (stop := text.find(closing, start + len(opening))) >= 0:
        yield text[start + len(opening) : stop]
        end = stop + len(closing)
