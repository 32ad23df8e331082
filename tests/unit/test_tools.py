"""The configured tools, real ones, called by the agent loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_page_reader import FAST, Server, serve
from test_protocols import SETTINGS, WORDS, Lines
from test_python_tool import isolated
from test_rewards import scoring
from test_rollouts import ScriptedSearch, searching

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.protocols.base import Answer
from igpo_megatron.chat.protocols.registry import PROTOCOLS
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.data.corpus import Passage
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.search.results import SearchResult, SearchStatus, SearchStopped
from igpo_megatron.tools.base import HIT, Observed, Tool
from igpo_megatron.tools.python.tool import PythonTool
from igpo_megatron.tools.registry import TOOLS, make_tools
from igpo_megatron.tools.tally import percentile, tally_metrics
from igpo_megatron.training.evaluate import summarise
from igpo_megatron.types import Prompt, Status, ToolCall

NEVER_ASKED = {"backend": "retriever", "url": "http://127.0.0.1:9/retrieve"}


def config(**rollout: object) -> Config:
    values = {"model": {"path": "nowhere"}, "rollout": {**SETTINGS, "protocol": "arpo", **rollout}, "visit": FAST, "search": NEVER_ASKED}
    return build(values, [])


def make(settings: Config) -> dict[str, Tool]:
    return make_tools(settings, len, HIT)


def test_only_what_is_configured_is_made() -> None:
    assert list(make(config(extra_tools=()))) == ["search"]
    assert list(make(config(extra_tools=("visit",)))) == ["search", "visit"]


def test_a_tool_that_cannot_work_stops_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> PythonTool:
        raise ValueError("the python tool cannot isolate code on this system: unshare failed")

    monkeypatch.setattr(PythonTool, "from_config", refuse)
    with pytest.raises(ValueError, match="cannot isolate"):
        make(config(extra_tools=("python",)))


@isolated
def test_a_trajectory_visits_a_page_computes_and_answers() -> None:
    arpo = PROTOCOLS["arpo"]

    async def scenario(address: str, server: Server) -> None:
        calls = [ToolCall("visit", (f"{address}/article",)), ToolCall("python", ("print(1788 - 1000)",))]
        engine = Lines("arpo", [arpo.write("t", action) for action in (*calls, Answer("788"))])
        settings = config()
        chat = ChatFormat(WORDS, settings.rollout, Reward())
        tools = {**make(settings), **searching(ScriptedSearch())}

        def play() -> None:
            with Rollouter(engine, tools, chat, settings.rollout, seed=0) as rollouter:  # type: ignore[arg-type]
                (group,) = rollouter.start(rollouter.run([Prompt("q", "?", ("788",), "t")], samples=1, salt=1, temperature=None)).result()
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

    with Rollouter(engine, {**searching(Search()), "visit": Visit()}, chat, settings.rollout, seed=0) as rollouter:
        tallies = rollouter.tallies()
        work = rollouter.run([Prompt("q", "?", ("788",), "t")], samples=1, salt=1, temperature=None, tallies=tallies)
        (group,) = rollouter.start(work).result()
        metrics = tally_metrics(tallies)
    assert 0 <= metrics.pop("visit/p50_s") <= metrics.pop("visit/p95_s") < 1
    assert metrics == {
        **{"search/calls": 2, "search/ok": 1, "search/empty": 1, "search/error": 0, "search/timeout": 0, "search/rate_limited": 0},
        **{"search/cached": 1, "search/p50_s": 0.25, "search/p95_s": 0.25},
        **{"visit/calls": 1, "visit/unreadable": 1, "visit/cached": 0},
    }
    score(group, scoring("arpo"))
    means = rollout_metrics([group])
    assert (means["searches"], means["visits"]) == (2.0, 1.0) and "python_calls" not in means
    assert summarise([group], settings)["searches"] == 2.0


def test_percentiles_interpolate_and_one_value_is_all_of_them() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5 and percentile([7.0], 95) == 7.0


def visits(cache: Path, mode: str, address: str, *urls: str, **visit: object) -> list[Observed]:
    settings = config(extra_tools=("visit",))
    search = settings.search.model_copy(update={"mode": mode, "cache": cache})
    own = settings.visit.model_copy(update=visit)
    tool = TOOLS["visit"].make(settings.model_copy(update={"search": search, "visit": own}), len)

    async def use() -> list[Observed]:
        try:
            return [await tool.use((f"{address}/{url}", "Blue Nile")) for url in urls]
        finally:
            await tool.close()

    return asyncio.run(use())


def test_pages_are_kept_in_the_store_of_searches_and_a_replay_shows_them_again_without_the_network(tmp_path: Path) -> None:
    async def scenario(address: str, server: Server) -> None:
        cache = tmp_path / "cache.sqlite"
        first = await asyncio.to_thread(visits, cache, "record", address, "article", "missing", "article", "down")
        assert [(shown.status, shown.cached) for shown in first] == [
            *(("ok", False), ("unreadable", False), ("ok", True), ("error", False)),
        ]
        assert first[3].failure is not None and first[0].text == first[2].text
        asked = len(server.seen)
        again = await asyncio.to_thread(visits, cache, "replay", address, "article", "missing")
        assert [shown.text for shown in again] == [shown.text for shown in first[:2]] and len(server.seen) == asked
        assert all(shown.cached for shown in again) and "HTTP 404" in again[1].text
        with pytest.raises(SearchStopped, match="has no answer of visit"):
            await asyncio.to_thread(visits, cache, "replay", address, "down")
        with pytest.raises(SearchStopped, match="was recorded with"):
            await asyncio.to_thread(visits, cache, "replay", address, "article", max_tokens=7)
        (live,) = await asyncio.to_thread(visits, cache, "live", address, "article")
        assert live.cached and len(server.seen) == asked

    serve(scenario)


def test_a_failed_visit_that_the_policy_is_told_of_is_not_stored(tmp_path: Path) -> None:
    async def scenario(address: str, server: Server) -> None:
        cache = tmp_path / "cache.sqlite"
        for _ in range(2):
            (shown,) = await asyncio.to_thread(visits, cache, "live", address, "down", show_failures=True)
            assert (shown.failure, shown.status, shown.cached) == (None, "error", False) and "HTTP 503" in shown.text

    serve(scenario)
