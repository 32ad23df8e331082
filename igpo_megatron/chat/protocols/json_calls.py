"""Calls as JSON, `{"name": ..., "arguments": {...}}`, and tools in the format of chat templates: shared by IGPO and Hermes.

Llama 3 calls its arguments `parameters` and writes a call without tags; Mistral writes a list of calls after [TOOL_CALLS].
"""

from __future__ import annotations

import json
from typing import Any

from igpo_megatron.chat.protocols.base import Malformed, ToolSet
from igpo_megatron.tools.base import Description
from igpo_megatron.types import SEARCH, ToolCall
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

ARGUMENT_KEYS = ("arguments", "parameters")
"""Keys of a call's arguments; the first one present is used."""


def parse_call(body: str, tools: ToolSet) -> ToolCall | Malformed:
    """One call. A call of an unknown tool is well-formed if it has a query; the policy is then shown the tools that exist."""
    try:
        return _call(json_loads_untrusted(body), tools)
    except BadJson as error:
        return Malformed(f"the tool call is not JSON: {error}")


def _call(call: Any, tools: ToolSet) -> ToolCall | Malformed:
    keys = [key for key in ARGUMENT_KEYS if key in call] if isinstance(call, dict) else []
    if not keys or not isinstance(call.get("name"), str) or not call["name"]:
        return Malformed("the tool call needs a name and arguments")
    name, arguments = tools.renamed(call["name"]), call[keys[0]]
    if (tool := tools.named(name)) is not None:
        return _extra_call(tool, arguments)
    given = arguments.get("query") if isinstance(arguments, dict) else None
    queries = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    texts = [query.strip() for query in queries if isinstance(query, str) and query.strip()]
    if not texts:
        return Malformed("the tool call has no query")
    return ToolCall(name, tuple(texts[: tools.max_queries]))


def bare_calls(text: str, tools: ToolSet) -> list[ToolCall | Malformed]:
    """The calls in a text that has nothing else and no tags, as Llama 3 and Mistral write them; empty for other texts."""
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


def _extra_call(tool: Description, arguments: Any) -> ToolCall | Malformed:
    values = [arguments.get(key) for key in tool.arguments] if isinstance(arguments, dict) else [None]
    if not isinstance(values[0], str) or not values[0].strip():
        return Malformed(f"the call of {tool.name} has no {next(iter(tool.arguments))}")
    texts = [value if tool.verbatim else value.strip() for value in values if isinstance(value, str) and value.strip()]
    return ToolCall(tool.name, tuple(texts))


def call_json(call: ToolCall, tools: ToolSet) -> str:
    """The inverse of `parse_call`. `<` is escaped, so no argument can close the tags around the call."""
    tool = tools.named(call.name)
    arguments: dict[str, Any] = dict(zip(tool.arguments, call.queries, strict=False)) if tool else {"query": list(call.queries)}
    return json.dumps({"name": tools.renamed(call.name), "arguments": arguments}, ensure_ascii=False).replace("<", "\\u003c")


def tool_schemas(tools: ToolSet) -> list[dict[str, Any]]:
    """All tools in the format of chat templates."""
    query = {"type": "array", "items": {"type": "string"}, "description": "One to three search queries."}
    search = _schema(tools.renamed(SEARCH), "Search for passages that help to answer the question.", {"query": query})
    texts = [{key: {"type": "string", "description": text} for key, text in tool.arguments.items()} for tool in tools.extra]
    return [search, *(_schema(tool.name, tool.purpose, properties) for tool, properties in zip(tools.extra, texts, strict=True))]


def tool_instructions(tools: ToolSet) -> str:
    """The description of the tools for a policy whose chat template has none."""
    schemas = "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in tool_schemas(tools))
    return (
        "You can call these tools, as often as you need. Each line describes one, with its parameters as a JSON schema:\n"
        f"<tools>\n{schemas}\n</tools>\n"
        "To call a tool, write its name and arguments as JSON between <tool_call> and </tool_call> and end your turn; "
        "its result will be shown to you:\n"
        '<tool_call>\n{"name": "the tool\'s name", "arguments": {"its parameter": "a value"}}\n</tool_call>'
    )


def _schema(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [next(iter(properties))]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
