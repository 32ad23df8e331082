"""The configured tools, real ones, called by the agent loop."""

from __future__ import annotations

import asyncio

import pytest
from test_page_reader import FAST, Server, serve
from test_protocols import SETTINGS, WORDS, Lines
from test_python_tool import isolated
from test_rollouts import ScriptedSearch

from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config, Reward
from igpo_megatron.protocols import PROTOCOLS, Answer
from igpo_megatron.rollout.chat import ChatFormat
from igpo_megatron.rollout.rollouter import Rollouter
from igpo_megatron.search.python_tool import PythonTool
from igpo_megatron.search.tools import make_tools
from igpo_megatron.types import Prompt, Status, ToolCall


def config(**rollout: object) -> Config:
    values = {"model": {"path": "nowhere"}, "rollout": {**SETTINGS, "protocol": "arpo", **rollout}, "visit": FAST}
    return build(values, [])


def test_only_what_is_configured_is_made() -> None:
    assert make_tools(config(extra_tools=()), len) == {}
    assert list(make_tools(config(extra_tools=("visit",)), len)) == ["visit"]


def test_a_tool_that_cannot_work_stops_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> PythonTool:
        raise ValueError("the python tool cannot isolate code on this system: unshare failed")

    monkeypatch.setattr(PythonTool, "from_config", refuse)
    with pytest.raises(ValueError, match="cannot isolate"):
        make_tools(config(extra_tools=("python",)), len)


@isolated
def test_a_trajectory_visits_a_page_computes_and_answers() -> None:
    arpo = PROTOCOLS["arpo"]

    async def scenario(address: str, server: Server) -> None:
        calls = [ToolCall("visit", (f"{address}/article",)), ToolCall("python", ("print(1788 - 1000)",))]
        engine = Lines("arpo", [arpo.write("t", action) for action in (*calls, Answer("788"))])
        settings = config()
        chat = ChatFormat(WORDS, settings.rollout, Reward())
        tools = make_tools(settings, chat.count_tokens)

        def play() -> None:
            with Rollouter(engine, ScriptedSearch(), chat, settings.rollout, seed=0, tools=tools) as rollouter:  # type: ignore[arg-type]
                (group,) = rollouter.run_sync([Prompt("q", "?", ("788",), "t")], samples=1, step=1, temperature=None)
            (end,) = group.trajectories
            assert (end.status, end.answer) == (Status.FINISHED, "788"), end.reason
            page, output = [node.text for node in group.nodes if node.kind == "observation"]
            assert "source of the Blue Nile" in page and output == "788"

        # The rollouter has a loop of its own; the page's server lives on this one.
        await asyncio.to_thread(play)

    serve(scenario)
