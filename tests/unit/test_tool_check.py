"""`igpo doctor tools` against servers on loopback: what is asked, what is found, what is advised."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from search_server import KEY, KEY_VARIABLE, SearchServer, serving
from test_data_prompts import DEV
from test_page_reader import FAST, Server, serve
from test_python_tool import isolated, without
from typer.testing import CliRunner

from igpo_megatron.cli import app
from igpo_megatron.config.load import ConfigError, build
from igpo_megatron.data.prompts import read_prompts
from igpo_megatron.doctor import tools as tool_check
from igpo_megatron.doctor.tools import Level, Stage, climb, num_calls, plan, questions, search_advice
from igpo_megatron.tools.tally import Tally


def configured(search: dict[str, Any], **sections: Any) -> Any:
    return build({"model": {"path": "nowhere"}, "search": {"api_key_env": KEY_VARIABLE, "timeout_s": 2.0, **search}, **sections}, [])


def measure(search: dict[str, Any], fault: Any = lambda asked: None, budget: int = 100, **sections: Any) -> tuple[int, str, SearchServer]:
    """(exit code, what was printed, the server)."""

    async def work() -> tuple[int, str, SearchServer]:
        async with serving(fault) as server:
            server.slow_s = 0.2
            config = configured({"backend": "serper", "url": f"{server.url}/serper", "timeout_s": 60.0, **search}, **sections)
            console = Console(file=io.StringIO(), width=120)
            code = await asyncio.to_thread(tool_check.main, config, budget, (), console)
            return code, console.file.getvalue(), server  # type: ignore[attr-defined]

    return asyncio.run(work())


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def test_a_plan_doubles_to_the_limit_and_stays_within_its_budget() -> None:
    assert plan(6, 100) == [Stage(1, 4), Stage(2, 4), Stage(4, 8), Stage(6, 12)]
    assert plan(64, 35) == plan(8, 10**9) and num_calls(plan(8, 10**9)) == 32
    assert plan(1, 100) == [Stage(1, 4)] and plan(8, 1) == [Stage(1, 1)]


def test_own_questions_come_first_and_no_query_is_asked_twice() -> None:
    asked = questions(configured({}, data={"eval": [str(DEV)], "train": ["nowhere.parquet"]}), 400)
    own = [prompt.question for prompt in read_prompts(DEV)]
    assert asked[: len(own)] == own and len(set(asked)) == 400


def test_a_sound_provider_is_climbed_to_the_limit_live_although_there_is_a_cache(tmp_path: Path) -> None:
    for _ in range(2):
        code, text, server = measure({"max_concurrency": 4, "mode": "record", "cache": str(tmp_path / "c.sqlite")}, lambda asked: "slow")
        assert code == 0 and len(server.asked) == 16 and server.most_running == 4
    assert not (tmp_path / "c.sqlite").exists()
    assert text.startswith("search.backend=serper gets at most 16 queries, 1, 2, 4 at once"), "announced before anything is sent"
    assert "search.max_concurrency=4 is safe: no errors at 4 at once" in text and "ok 100%" in text and KEY not in text
    assert "A step's 512 trajectories search" in text


def test_the_concurrency_at_which_errors_start_is_found_and_ends_the_climb() -> None:
    servers: list[SearchServer] = []

    def crowded(asked: Any) -> str | None:
        return "429" if running() > 4 else "slow"

    def running() -> int:
        return servers[0].running + 1

    async def work() -> tuple[int, str]:
        async with serving(crowded) as server:
            servers.append(server)
            server.slow_s = 0.2
            config = configured({"backend": "serper", "url": f"{server.url}/serper", "timeout_s": 60.0, "max_concurrency": 32})
            console = Console(file=io.StringIO(), width=120)
            return await asyncio.to_thread(tool_check.main, config, 200, (), console), console.file.getvalue()  # type: ignore[attr-defined]

    code, text = asyncio.run(work())
    assert code == 0 and "Set search.max_concurrency=4: at 8 at once" in text
    assert "rate_limited" in text and "Or set search.rate_per_s" in text
    assert len(servers[0].asked) == 4 + 4 + 8 + 16, "16 at once are not tried, and nothing is tried twice"


@pytest.mark.parametrize(("fault", "words"), [("401", "refuses the key in SEARCH_TEST_KEY"), ("quota", "has no searches left")])
def test_a_refused_key_or_a_spent_quota_ends_it_with_one_sentence(fault: str, words: str) -> None:
    code, text, server = measure({}, lambda asked: fault)
    assert code == 1 and len(server.asked) == 1 and KEY not in text
    assert [line for line in text.splitlines()[1:] if words in line] and text.count("stopped:") == 1 and len(text.splitlines()) == 2


def test_a_provider_that_fails_at_once_is_not_asked_further() -> None:
    code, text, server = measure({}, lambda asked: "500")
    assert code == 1 and len(server.asked) == 4
    assert "Search does not work: 4 of 4 queries failed, one at a time; most often: serper: error:" in text and "HTTP 500" in text


def test_a_small_budget_says_what_was_not_tried() -> None:
    _, text, server = measure({"max_concurrency": 8}, budget=8)
    assert len(server.asked) == 8 and "No errors up to 2 at once; --queries 32 would try all of search.max_concurrency=8" in text


def level(at_once: int, latency_s: float, calls: int = 10, status: str = "ok", wall_s: float = 1.0) -> Level:
    tally = Tally()
    for _ in range(calls):
        tally.add(status, latency_s, cached=False, failure=None)
    return Level(at_once, tally, wall_s)


def test_advice_on_timeouts_saturation_and_empty_answers_names_the_keys() -> None:
    config = configured({"backend": "serper", "max_concurrency": 4})
    said = " ".join(search_advice(config, [level(1, 0.1), level(2, 0.2), level(4, 1.5, status="empty", calls=40, wall_s=4.1)]))
    assert "search.max_concurrency=1 would be enough: 4 at once bring 9.8 answers per second, 1 bring 10" in said
    assert "Raise search.timeout_s=2 to 4: at 4 at once p95 is 1.5 s" in said
    assert "40 of 60 answers had no passage" in said


def test_a_stray_failure_does_not_end_a_climb() -> None:
    async def call(tally: Tally, number: int) -> None:
        tally.add("ok", 0.0, cached=False, failure="stray" if number == 0 else None)

    levels = asyncio.run(climb(plan(2, 100), call, lambda: None))
    assert [level.failed for level in levels] == [1, 0]


@isolated
def test_visit_and_python_are_measured_where_they_are_enabled() -> None:
    rollout = {"extra_tools": ["visit", "python"], "protocol": "arpo"}

    async def scenario(address: str, server: Server) -> None:
        async with serving() as searched:
            config = configured(
                {"backend": "serper", "url": f"{searched.url}/serper", "max_concurrency": 1},
                rollout=rollout,
                visit=FAST,
                python={"max_concurrency": 1},
            )
            console = Console(file=io.StringIO(), width=120)
            pages = [f"{address}/article", f"{address}/missing", f"{address}/down"]
            code = await asyncio.to_thread(tool_check.main, config, 4, pages, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert code == 0 and "1 of 3 visits failed" in text and "visit.show_failures=true" in text
        assert "python.max_concurrency=1 is fine here" in text

    serve(scenario)


def test_the_command_reads_overrides_and_says_mistakes_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: nowhere}\n")
    result = CliRunner().invoke(app, ["doctor", "tools", str(file), "search.backend=serper", f"search.api_key_env={KEY_VARIABLE}"])
    assert result.exit_code == 2 and f"search.api_key_env={KEY_VARIABLE}: that environment variable is not set" in result.output


@isolated
def test_what_the_system_does_not_enforce_for_python_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "PidsGroup.enter")
    config = configured({"backend": "serper"}, python={"max_concurrency": 1})
    finding = asyncio.run(tool_check._python(config, lambda name, total: lambda: None))
    assert finding.works and finding.advice[1].startswith("Not enforced on this system: no control group bounds the processes (not here)")


def test_a_tool_that_nobody_knows_is_refused():
    config = build({"model": {"path": "m"}}, ["rollout.extra_tools=[vist]"])
    with pytest.raises(ConfigError, match=r"rollout.extra_tools.*'vist'.*visit"):
        tool_check.main(config, budget=1, pages=[])
