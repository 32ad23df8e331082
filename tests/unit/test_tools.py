"""The configured tools, real ones, called by the agent loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from test_page_reader import FAST, Server, serve
from test_protocols import SETTINGS, WORDS, Lines
from test_python_tool import isolated
from test_rollouts import ScriptedSearch

from igpo_megatron.algorithms.rewards import score
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config, Reward
from igpo_megatron.data.corpus import Passage
from igpo_megatron.evaluate import summarise
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.protocols import PROTOCOLS, Answer
from igpo_megatron.rollout.chat import ChatFormat
from igpo_megatron.rollout.rollouter import Rollouter
from igpo_megatron.search.python_tool import PythonTool
from igpo_megatron.search.results import Observed, SearchResult, SearchStatus
from igpo_megatron.search.tally import percentile
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


def test_the_metrics_of_a_step_count_searches_by_status_and_other_tools_apart() -> None:
    arpo = PROTOCOLS["arpo"]
    calls = [ToolCall("search", ("Blue Nile",)), ToolCall("visit", ("http://lake.example",)), ToolCall("search", ("nothing",))]
    engine = Lines("arpo", [arpo.write("t", action) for action in (*calls, Answer("788"))])
    settings = config(tool_name="search", extra_tools=("visit",))
    chat = ChatFormat(WORDS, settings.rollout, Reward())

    class Search:
        async def search(self, queries: Sequence[str]) -> list[SearchResult]:
            nothing = "nothing" in queries[0]
            status, passages = (SearchStatus.EMPTY, ()) if nothing else (SearchStatus.OK, (Passage("1", "Nile", "A river."),))
            return [SearchResult(query, status, "scripted", passages, latency_s=0.25, cached=nothing) for query in queries]

        async def close(self) -> None: ...

    class Visit:
        async def use(self, arguments: Sequence[str]) -> Observed:
            return Observed("The page could not be read: HTTP 404", status="unreadable")

        async def close(self) -> None: ...

    with Rollouter(engine, Search(), chat, settings.rollout, seed=0, tools={"visit": Visit()}) as rollouter:  # type: ignore[arg-type]
        (group,) = rollouter.run_sync([Prompt("q", "?", ("788",), "t")], samples=1, step=1, temperature=None)
        metrics = rollouter.tool_metrics()
    assert 0 <= metrics.pop("visit/p50_s") <= metrics.pop("visit/p95_s") < 1
    assert metrics == {
        **{"search/calls": 2, "search/ok": 1, "search/empty": 1, "search/error": 0, "search/timeout": 0, "search/rate_limited": 0},
        **{"search/cached": 1, "search/p50_s": 0.25, "search/p95_s": 0.25},
        **{"visit/calls": 1, "visit/unreadable": 1, "visit/cached": 0},
    }
    score(group, Reward(), arpo)
    means = rollout_metrics([group], "search")
    assert (means["searches"], means["visits"]) == (2.0, 1.0) and "python_calls" not in means
    assert summarise([group], settings)["searches"] == 2.0


def test_percentiles_interpolate_and_one_value_is_all_of_them() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5 and percentile([7.0], 95) == 7.0
