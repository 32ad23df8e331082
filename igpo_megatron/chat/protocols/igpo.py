"""IGPO as published (arXiv 2510.14967): `<think>`, then one `<tool_call>` with JSON in it or one `<answer>`; results are tool messages.

<think>...</think><tool_call>{"name": "web_search", "arguments": {"query": ["...", "..."]}}</tool_call>
<think>...</think><answer>...</answer>
"""

from __future__ import annotations

from collections.abc import Sequence

from igpo_megatron.chat.protocols.base import BUILT_IN, Action, Answer, Malformed, ToolProtocol, ToolSet, balanced, between
from igpo_megatron.chat.protocols.json_calls import call_json, parse_call
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import clean_text

TAGS = ("code", "tool_call", "think", "answer")
"""Tags that the published format check counts."""


def parse(text: str, tools: ToolSet) -> Action:
    """First match wins, as published: think + answer, think + tool call, anything else is malformed."""
    text = clean_text(text)
    if next(between(text, "think"), None) is None:
        return Malformed("no closed <think> block")
    if "<answer>" in text:
        answer = next(between(text, "answer"), None)
        return Answer(answer.strip()) if answer is not None else Malformed("<answer> is not closed")
    if "<tool_call>" in text:
        call = next(between(text, "tool_call"), None)
        return parse_call(call, tools) if call is not None else Malformed("<tool_call> is not closed")
    return Malformed("neither <answer> nor <tool_call>")


def tags_balanced(text: str) -> bool:
    """True if every tag of `TAGS` opens as often as it closes and every opening has a closing after it."""
    return balanced(text, TAGS)


def well_formed_answer(text: str) -> str | None:
    """Text inside the first answer tags of a well-formed text, in lower case as published; None if the format check fails."""
    # The check ignores case: the published code lowers the whole response first.
    text = text.lower()
    return next(between(text, "answer"), None) if tags_balanced(text) else None


def final_answer(turns: Sequence[str]) -> str | None:
    """The published check on all turns together."""
    return well_formed_answer("".join(turns))


def write(thought: str, action: ToolCall | Answer, tools: ToolSet = BUILT_IN) -> str:
    """One turn."""
    refuse_tags(thought, "think", "answer", "tool_call")
    if isinstance(action, ToolCall):
        return f"<think>{thought}</think>\n<tool_call>{call_json(action, tools)}</tool_call>"
    refuse_tags(action.text, *TAGS)
    return f"<think>{thought}</think>\n<answer>{action.text}</answer>"


def refuse_tags(text: str, *tags: str) -> None:
    """Raise ValueError if the text contains one of the tags: written between others, it would be read as something else."""
    for tag in tags:
        if f"<{tag}>" in text or f"</{tag}>" in text:
            raise ValueError(f"{text[:80]!r} contains a {tag} tag, so this protocol cannot write it")


IGPO = ToolProtocol(parse=parse, write=write, final_answer=final_answer)
