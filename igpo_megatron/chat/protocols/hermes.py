"""Native tool calls of Qwen and Hermes models, as their chat templates write them: thinking is optional, calls need no answer tag.

    (<think>...</think>) text <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call> (<tool_call>...)
    (<think>...</think>) {"name": ..., "parameters": {...}}, the whole turn, as Llama 3 writes a call
    (<think>...</think>) [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], as Mistral writes calls
    (<think>...</think>) the answer, or text with <answer>the answer</answer> in it

A turn without a call is the answer. Several searches in one turn are one call with several queries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from igpo_megatron.chat.protocols.base import BUILT_IN, Action, Answer, Malformed, ToolProtocol, ToolSet, balanced, between
from igpo_megatron.chat.protocols.igpo import refuse_tags
from igpo_megatron.chat.protocols.json_calls import bare_calls, call_json, parse_call
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import clean_text

TAGS = ("think", "tool_call", "answer")
_CONTROL = re.compile(r"<\|[^<>|\s]+\|>")


def parse(text: str, tools: ToolSet) -> Action:
    """The calls after the thought, else the answer. Tags inside the thought are part of it."""
    text = clean_text(text)
    _, closing, said = text.rpartition("</think>")
    if "<think>" in (said if closing else text):
        return Malformed("<think> is not closed")
    if said.count("<tool_call>") != said.count("</tool_call>"):
        return Malformed("<tool_call> is not closed")
    calls = [parse_call(body, tools) for body in between(said, "tool_call")]
    bare = _without_controls(said)
    if calls := calls or bare_calls(bare, tools):
        return _one_call(calls, tools)
    tagged = next(between(said, "answer"), None)
    answer = bare if tagged is None else tagged.strip()
    return Answer(answer) if answer else Malformed("neither an answer nor a tool call")


def _without_controls(text: str) -> str:
    """The text without control tokens at its end: external texts may still have the one that ended the turn."""
    text = text.strip()
    while _CONTROL.fullmatch(text, start := max(0, text.rfind("<|"))):
        text = text[:start].rstrip()
    return text


def _one_call(calls: Sequence[ToolCall | Malformed], tools: ToolSet) -> ToolCall | Malformed:
    good = [call for call in calls if isinstance(call, ToolCall)]
    if bad := next((call for call in calls if isinstance(call, Malformed)), None):
        return bad
    names = {call.name for call in good}
    if len(good) > 1 and (len(names) > 1 or any(map(tools.named, names))):
        return Malformed(f"{len(good)} calls of {' and '.join(sorted(names))} in one turn; only searches can go together")
    if len(good) == 1:
        return good[0]
    return ToolCall(good[0].name, tuple(query for call in good for query in call.queries)[: tools.max_queries])


def final_answer(turns: Sequence[str]) -> str | None:
    """The last turn's answer, if tags are balanced in every turn and no turn wrote a tool's result itself."""
    if not turns or any("tool_response>" in turn or not balanced(turn, TAGS) for turn in turns):
        return None
    action = parse(turns[-1], ToolSet())
    return action.text if isinstance(action, Answer) else None


def write(thought: str, action: ToolCall | Answer, tools: ToolSet = BUILT_IN) -> str:
    """One turn; an empty thought writes no think block."""
    refuse_tags(thought, "think")
    opening = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    if isinstance(action, ToolCall):
        return f"{opening}<tool_call>\n{call_json(action, tools)}\n</tool_call>"
    refuse_tags(action.text, *TAGS, "tool_response")
    return f"{opening}<answer>{action.text}</answer>"


HERMES = ToolProtocol(parse=parse, write=write, final_answer=final_answer)
