"""Calls as JSON, `{"name": ..., "arguments": {...}}`, and the tools as chat templates want them: shared by IGPO and Hermes.

Llama 3 calls its arguments `parameters`, and writes a call without tags; Mistral writes a list of calls behind [TOOL_CALLS].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from igpo_megatron.chat.protocols.base import Malformed, ToolSet
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

ARGUMENTS = {"visit": ("url", "goal"), "python": ("code",)}
"""Extra tool -> its arguments in the order of `ToolCall.queries`; the first is required."""

ARGUMENT_KEYS = ("arguments", "parameters")
"""Where a call holds its arguments; the first that is there counts."""


def parse_call(body: str, tools: ToolSet) -> ToolCall | Malformed:
    """One call. A tool that does not exist is well-formed if it asks for something: the policy is told which ones there are."""
    try:
        return _call(json_loads_untrusted(body), tools)
    except BadJson as error:
        return Malformed(f"the tool call is not JSON: {error}")


def _call(call: Any, tools: ToolSet) -> ToolCall | Malformed:
    keys = [key for key in ARGUMENT_KEYS if key in call] if isinstance(call, dict) else []
    if not keys or not isinstance(call.get("name"), str) or not call["name"]:
        return Malformed("the tool call needs a name and arguments")
    name, arguments = call["name"], call[keys[0]]
    if name in tools.extra:
        return _extra_call(name, arguments)
    given = arguments.get("query") if isinstance(arguments, dict) else None
    queries = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    texts = [query.strip() for query in queries if isinstance(query, str) and query.strip()]
    if not texts:
        return Malformed("the tool call has no query")
    return ToolCall(name, tuple(texts[: tools.max_queries]))


def bare_calls(text: str, tools: ToolSet) -> list[ToolCall | Malformed]:
    """The calls that are the whole text, without tags, as Llama 3 and Mistral write them; none where the text is something else."""
    body = text.strip().removeprefix("<|python_tag|>").removeprefix("[TOOL_CALLS]").strip()
    if body[:1] + body[-1:] not in ("{}", "[]") or '"name"' not in body:
        return []
    try:
        found = json_loads_untrusted(body)
    except BadJson:
        return []
    calls = found if isinstance(found, list) else [found]
    return [_call(call, tools) for call in calls] if all(map(_is_call, calls)) else []


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and any(isinstance(value.get(key), dict) for key in ARGUMENT_KEYS)


def _extra_call(name: str, arguments: Any) -> ToolCall | Malformed:
    required, *optional = ARGUMENTS[name]
    values = [arguments.get(key) for key in (required, *optional)] if isinstance(arguments, dict) else [None]
    if not isinstance(values[0], str) or not values[0].strip():
        return Malformed(f"the call of {name} has no {required}")
    # Code keeps its spaces: the first line may be indented for a reason.
    texts = [value if name == "python" else value.strip() for value in values if isinstance(value, str) and value.strip()]
    return ToolCall(name, tuple(texts))


def call_json(call: ToolCall) -> str:
    """The inverse of `parse_call`. Angle brackets are escaped, so no argument can close the tags around the call."""
    keys = ARGUMENTS.get(call.name)
    arguments: dict[str, Any] = dict(zip(keys, call.queries, strict=False)) if keys else {"query": list(call.queries)}
    return json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False).replace("<", "\\u003c")


def tool_schema(name: str) -> dict[str, Any]:
    """The search tool as chat templates want it."""
    query = {"type": "array", "items": {"type": "string"}, "description": "One to three search queries."}
    return _schema(name, "Search for passages that help to answer the question.", {"query": query}, ["query"])


def tool_schemas(tools: ToolSet) -> list[dict[str, Any]]:
    """All tools as chat templates want them."""
    return [tool_schema(tools.search), *(EXTRA_SCHEMAS[name] for name in tools.extra)]


def tool_instructions(tools: ToolSet) -> str:
    """What the policy is told of the tools where its chat template says nothing of them."""
    schemas = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in tool_schemas(tools))
    return (
        "You can call these tools, as often as you need. Each line describes one, with its parameters as a JSON schema:\n"
        f"<tools>\n{schemas}\n</tools>\n"
        "To call a tool, write its name and arguments as JSON between <tool_call> and </tool_call> and end your turn; "
        "its result will be shown to you:\n"
        '<tool_call>\n{"name": "the tool\'s name", "arguments": {"its parameter": "a value"}}\n</tool_call>'
    )


def _schema(name: str, description: str, properties: dict[str, Any], required: Sequence[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _text(description: str) -> dict[str, str]:
    return {"type": "string", "description": description}


EXTRA_SCHEMAS = {
    "visit": _schema(
        "visit",
        "Read a web page.",
        {"url": _text("Address of the page."), "goal": _text("What to look for on it.")},
        ["url"],
    ),
    "python": _schema(
        "python",
        "Run Python code once and see what it prints and the value of its last line. Nothing is kept between calls.",
        {"code": _text("The code.")},
        ["code"],
    ),
}
"""Extra tool -> its description."""
