"""IGPO as published (arXiv 2510.14967): `<think>`, then one `<tool_call>` with JSON in it or one `<answer>`; results are tool messages.

<think>...</think><tool_call>{"name": "web_search", "arguments": {"query": ["...", "..."]}}</tool_call>
<think>...</think><answer>...</answer>
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from igpo_megatron.protocols.base import Action, Answer, Malformed, ToolProtocol, ToolSet, balanced
from igpo_megatron.protocols.json_calls import call_json, parse_call
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import clean_text

TAGS = ("code", "tool_call", "think", "answer")
"""Tags that the published format check counts."""

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def parse_action(text: str, max_queries: int) -> Action:
    """`parse` where search is the only tool, under whatever name."""
    return parse(text, ToolSet("search", max_queries))


def parse(text: str, tools: ToolSet) -> Action:
    """First match wins, as published: think + answer, think + tool call, anything else is malformed."""
    text = clean_text(text)
    if not re.search(r"<think>.*?</think>", text, re.DOTALL):
        return Malformed("no closed <think> block")
    if "<answer>" in text:
        found = _ANSWER.search(text)
        return Answer(found.group(1).strip()) if found else Malformed("<answer> is not closed")
    if "<tool_call>" in text:
        found = _CALL.search(text)
        return parse_call(found.group(1), tools) if found else Malformed("<tool_call> is not closed")
    return Malformed("neither <answer> nor <tool_call>")


def tags_balanced(text: str) -> bool:
    """True if every tag of `TAGS` opens as often as it closes and every opening has a closing after it."""
    return balanced(text, TAGS)


def well_formed_answer(text: str) -> str | None:
    """Text inside the first answer tags of a well-formed text, in lower case as published; None where the format check fails."""
    # The check ignores case: the published code lowers the whole response first.
    text = text.lower()
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found.group(1) if found and tags_balanced(text) else None


def final_answer(turns: Sequence[str]) -> str | None:
    """The published check on all turns together."""
    return well_formed_answer("".join(turns))


def write(thought: str, action: ToolCall | Answer) -> str:
    """One turn."""
    refuse_tags(thought, "think", "answer", "tool_call")
    if isinstance(action, ToolCall):
        return f"<think>{thought}</think>\n<tool_call>{call_json(action)}</tool_call>"
    refuse_tags(action.text, *TAGS)
    return f"<think>{thought}</think>\n<answer>{action.text}</answer>"


def refuse_tags(text: str, *tags: str) -> None:
    """ValueError where the text holds one of the tags: written between others, it would be read as something else."""
    for tag in tags:
        if f"<{tag}>" in text or f"</{tag}>" in text:
            raise ValueError(f"{text[:80]!r} holds a {tag} tag, so this protocol cannot write it")


IGPO = ToolProtocol(parse=parse, write=write, final_answer=final_answer)
