"""From configuration to the tools beside search. A new tool is one class, one line here and its arguments in
chat/protocols/json_calls.py."""

from __future__ import annotations

from collections.abc import Callable

from igpo_megatron.config.schema import Config
from igpo_megatron.search.client import stored
from igpo_megatron.tools.base import Tool
from igpo_megatron.tools.python.tool import PythonTool
from igpo_megatron.tools.stored_tool import PageClient, StoredTool, keeps, visit_shelf
from igpo_megatron.tools.visit.reader import CountTokens, PageReader


def make_tools(config: Config, count_tokens: CountTokens) -> dict[str, Tool]:
    """Name -> tool, of `rollout.extra_tools`. UserError where settings are wrong or this system cannot run a tool as configured."""
    makers: dict[str, Callable[[], Tool]] = {
        "visit": lambda: _visit(config, count_tokens),
        "python": lambda: PythonTool.from_config(config.python),
    }
    return {name: makers[name]() for name in config.rollout.extra_tools}


def _visit(config: Config, count_tokens: CountTokens) -> Tool:
    if not keeps(config.search):
        return PageReader.from_config(config.visit, count_tokens)
    return StoredTool(
        stored(config.search, visit_shelf(config.visit), lambda: PageClient(PageReader.from_config(config.visit, count_tokens)))
    )
