"""Tools by name; a user's own by `package.module:name`. A new tool is one file and one row in `TOOLS`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.config.schema import Config
from igpo_megatron.search.client import make_client, stored
from igpo_megatron.settings import is_hook, lacks, load_hook, unknown
from igpo_megatron.tools.base import Description, Tool
from igpo_megatron.tools.python.tool import PYTHON, PythonTool
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.tools.stored_tool import PageClient, StoredTool, visit_namespace
from igpo_megatron.tools.visit.reader import VISIT, CountTokens, PageReader
from igpo_megatron.types import SEARCH, UserError

KEY = "rollout.extra_tools"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tool besides search."""

    description: Description
    make: Callable[[Config, CountTokens], Tool]
    """Raises UserError if settings are wrong or this system cannot run the tool as configured."""


def _visit(config: Config, count_tokens: CountTokens) -> Tool:
    if config.search.cache is None and config.search.mode not in ("record", "replay"):
        return PageReader(config.visit, count_tokens)
    client = stored(config.search, visit_namespace(config.visit), lambda: PageClient(PageReader(config.visit, count_tokens)))
    return StoredTool(client)


TOOLS: dict[str, Entry] = {
    "visit": Entry(VISIT, _visit),
    "python": Entry(PYTHON, lambda config, _: PythonTool.from_config(config.python)),
}
"""`rollout.extra_tools` -> tool."""


def entry(name: str) -> Entry:
    """A built-in tool, or a user's: `package.module:name` of a class or function that has a `description` and takes the tool's options.

    Raises UserError if it does not exist or is not a tool.
    """
    if name in TOOLS:
        return TOOLS[name]
    if not is_hook(name):
        raise UserError(unknown(KEY, name, TOOLS))
    make = load_hook(KEY, name)
    description = getattr(make, "description", None)
    if not isinstance(description, Description):
        raise UserError(f"{KEY}: {name}.description is {description!r}; expected an igpo_megatron.tools.base.Description")
    try:
        inspect.signature(make).bind({})
    except TypeError as error:
        raise UserError(f"{KEY}: {name} cannot be called with its options, a dict ({error})") from None
    if isinstance(make, type):
        require_tool(name, make)

    def made(config: Config, _: CountTokens) -> Tool:
        tool: Tool = make(config.rollout.tool_options.get(description.name, {}))
        require_tool(name, tool)
        return tool

    return Entry(description, made)


def require_tool(name: str, tool: Any) -> None:
    """Raise UserError if something is not a `Tool`."""
    for method in lacks(tool, ("use", "close")):
        raise UserError(f"{KEY}: {name} has no `async def {method}`; see Tool in igpo_megatron/tools/base.py")


def describe(names: Sequence[str]) -> tuple[Description, ...]:
    """Descriptions, for the policy, of the tools besides search. UserError as `entry`."""
    return tuple(entry(name).description for name in names)


def problems(rollout: Rollout) -> Iterator[str]:
    """Problems with the names of tools, users' own included."""
    names = [rollout.tool_name]
    for name in rollout.extra_tools:
        try:
            names.append(entry(name).description.name)
        except UserError as error:
            yield str(error)
    if rollout.tool_name in (*TOOLS, *names[1:]):
        yield f"rollout.tool_name={rollout.tool_name} is the name of another tool; search needs one of its own, such as search"
    if SEARCH in names[1:]:
        yield f"{KEY}: a tool is called {SEARCH}, which is the name of the search tool; give it another"
    if len(set(names[1:])) < len(names[1:]):
        yield f"{KEY}={list(rollout.extra_tools)} names a tool more than once; name each once"
    if strangers := sorted(rollout.tool_options.keys() - {*names[1:]}):
        yield f"rollout.tool_options.{strangers[0]}: no tool of that name; {KEY} has {', '.join(names[1:]) or 'none'}"


def make_tools(config: Config, count_tokens: CountTokens, hit: str) -> dict[str, Tool]:
    """Name -> tool: search, whose passages are shown as `hit`, and those of `rollout.extra_tools`.

    Raises UserError if settings are wrong or this system cannot run a tool as configured.
    """
    tools: dict[str, Tool] = {SEARCH: SearchTool(make_client(config.search), hit)}
    for name in config.rollout.extra_tools:
        extra = entry(name)
        tools[extra.description.name] = extra.make(config, count_tokens)
    return tools
