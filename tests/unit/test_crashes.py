"""A trajectory that raises what nobody expected ends alone, is counted, and leaves its traceback; too many of them stop the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest
from test_branching import CALM, THRESHOLD, UNSURE, UnsureEngine
from test_gain_branching import REWARD, KnowingEngine
from test_rollouts import ANSWER, SEARCH, SETTINGS, WORDS, ScriptedEngine, ScriptedSearch, searching

from igpo_megatron.agent.rollouter import Rollouter, RolloutFailure
from igpo_megatron.agent.settings import ArpoBranching, GainBranching, Rollout
from igpo_megatron.agent.trees import entropy as branching
from igpo_megatron.agent.trees import gain as gain_branching
from igpo_megatron.algorithms.info_gain import rendered_probes
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.console import SHOWN, _shown
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.search.results import SearchResult
from igpo_megatron.supervision.failures import MOST_BYTES, MOST_CHARS, CrashLog
from igpo_megatron.training.evaluate import evaluate
from igpo_megatron.types import Completion, ProbeScore, Prompt, RolloutGroup, SamplingRequest, Status

CRASHED, FINISHED = Status.CRASHED, Status.FINISHED
BOOM = "nobody expected \ud800 this"


class OneCrashes(ScriptedEngine):
    """Raises in the first request that it gets, or in every one."""

    def __init__(self, *script: str, always: bool = False) -> None:
        super().__init__(*script)
        self.always = always

    async def generate(self, request: SamplingRequest) -> Completion:
        if self.always or not self.calls:
            self.calls.append((request.token_ids, 0, 0))
            raise ZeroDivisionError(BOOM)
        return await super().generate(request)


def rollouter(engine: object, crashes: Path | None, search: object = None, reward: Reward | None = None, **changes: object) -> Rollouter:
    config = Rollout(**{"max_failed_fraction": 0.5, **SETTINGS, **changes})  # type: ignore[arg-type]
    form = ChatFormat(WORDS, config, reward or Reward())
    probes_of = partial(rendered_probes, render_probe=form.render_probe, config=reward or Reward())
    return Rollouter(engine, searching(search or ScriptedSearch()), form, config, seed=1, probes_of=probes_of, crashes=crashes)  # type: ignore[arg-type]


def run(
    engine: object, crashes: Path | None, *, samples: int = 4, prompts: int = 1, branch: bool = False, **changes: object
) -> list[RolloutGroup]:
    questions = [Prompt(f"q{number}", "What is the capital of Italy?", ("Rome",), "test") for number in range(prompts)]
    with rollouter(engine, crashes, **changes) as rollouts:  # type: ignore[arg-type]
        return rollouts.start(rollouts.run(questions, samples=samples, salt=1, temperature=None, probe=branch, branch=branch)).result()


def statuses(group: RolloutGroup) -> list[Status]:
    return [end.status for end in group.trajectories]


def test_a_crash_ends_one_trajectory_is_counted_and_leaves_its_traceback(tmp_path: Path) -> None:
    (group,) = run(OneCrashes(ANSWER), tmp_path / "new" / "crashes.log")
    assert statuses(group) == [CRASHED, FINISHED, FINISHED, FINISHED]
    end = group.trajectories[0]
    assert end.reason.startswith("ZeroDivisionError: nobody expected \ufffd this") and "crashes.log" in end.reason
    assert not end.status.is_trainable and end.status.is_failure
    metrics = rollout_metrics([group])
    assert metrics["crashed"] == metrics["failed"] == 0.25
    kept = (tmp_path / "new" / "crashes.log").read_text(encoding="utf-8")
    assert "sample 0 of question q0" in kept and "raise ZeroDivisionError(BOOM)" in kept and kept.count("Traceback") == 1


def test_too_many_crashes_stop_the_run_and_name_the_cause_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(RolloutFailure, match=r"4 of 4 trajectories failed.*max_failed_fraction=0\.5.*ZeroDivisionError.*crashes\.log"):
        run(OneCrashes(ANSWER, always=True), tmp_path / "crashes.log")
    assert (tmp_path / "crashes.log").read_text(encoding="utf-8").count("Traceback") == 4


def test_a_tool_that_raises_is_a_crash_and_its_own_timeout_is_not_the_deadlines(tmp_path: Path) -> None:
    class Broken(ScriptedSearch):
        async def search(self, queries: Sequence[str]) -> list[SearchResult]:
            raise TimeoutError("an inner one")

    (group,) = run(ScriptedEngine(SEARCH, ANSWER), tmp_path / "c", search=Broken(), samples=1, max_failed_fraction=1.0)
    (end,) = group.trajectories
    assert end.status is CRASHED and "TimeoutError: an inner one" in end.reason and "deadline" not in end.reason


def test_what_is_cancelled_has_not_crashed(tmp_path: Path) -> None:
    class Never(ScriptedEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            self.calls.append((request.token_ids, 0, 0))
            await asyncio.Event().wait()
            raise AssertionError

    engine = Never(ANSWER)
    with rollouter(engine, tmp_path / "crashes.log") as rollouts:
        work = rollouts.start(rollouts.run([Prompt("q", "?", ("a",), "t")], samples=2, salt=1, temperature=None))
        while len(engine.calls) < 2:
            time.sleep(0.001)
        work.cancel()
        with pytest.raises(CancelledError):
            work.result()
    assert not (tmp_path / "crashes.log").exists()


def test_a_crash_while_a_path_is_measured_ends_that_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = branching.step_entropy, []

    def once(*arguments: object) -> float:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("first")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(branching, "step_entropy", once)
    way = ArpoBranching(**THRESHOLD)  # type: ignore[arg-type]
    (group,) = run(UnsureEngineWithProbes(CALM, UNSURE), tmp_path / "c", samples=4, branch=True, branching=way, deadline_s=120)
    assert sorted(statuses(group)) == [CRASHED, *[FINISHED] * 3]


class UnsureEngineWithProbes(UnsureEngine):
    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        return ProbeScore(tuple(-1.0 for _ in token_ids[first:]), 7)


def test_a_crash_of_what_decides_on_forks_takes_its_group_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, groups = gain_branching.fork_probability, []

    def breaks(siblings: Sequence[float], config: GainBranching) -> float:
        groups.append(1)
        if len(groups) == 1:
            raise OverflowError("the first group's decision")
        return real(siblings, config)

    monkeypatch.setattr(gain_branching, "fork_probability", breaks)
    engine = KnowingEngine(dict.fromkeys("abcdefgh", (0.2, 0.5)))
    way = GainBranching(initial_rollouts=2)
    settings = {"branching": way, "max_turns": 5, "max_context": 1200, "deadline_s": 120, "reward": REWARD}
    pair = run(engine, tmp_path / "c", samples=3, prompts=2, branch=True, **settings)
    assert sorted(map(statuses, pair)) == [[CRASHED] * 3, [FINISHED] * 3]
    assert "OverflowError" in (tmp_path / "c").read_text(encoding="utf-8")


def test_a_crash_of_a_probe_ends_the_path_that_waits_for_it(tmp_path: Path) -> None:
    class Probed(KnowingEngine):
        async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
            if self.state(WORDS.decode(token_ids))[1] == "b":
                raise LookupError("no such probe")
            return await super().score_probe(token_ids, first, key=key)

    engine = Probed({letter: (0.2, value) for letter, value in zip("abcdefgh", (0.1, 0.5, 0.9) * 3, strict=False)})
    way = GainBranching(initial_rollouts=3, spread_weight=2.5, stop_probability=0.0)
    settings = {"branching": way, "max_turns": 5, "max_context": 1200, "deadline_s": 120, "reward": REWARD}
    (group,) = run(engine, tmp_path / "c", samples=5, branch=True, **settings)
    assert statuses(group) == [FINISHED, CRASHED, *[FINISHED] * 3] and "LookupError" in group.trajectories[1].reason


def test_an_evaluation_counts_its_crashes(tmp_path: Path) -> None:
    config = Config.model_validate({"model": {"path": "."}, "eval": {"samples": 4, "greedy": False}})
    with rollouter(OneCrashes(ANSWER), tmp_path / "crashes.log") as rollouts:
        report = evaluate(rollouts, [Prompt("q", "?", ("Rome",), "test")], config, step=0, version=7, folder=tmp_path)
    assert report["sampled"]["status"] == {"finished": 3, "crashed": 1}


def test_the_console_shows_crashes_where_there_are_any() -> None:
    assert _shown({"crashed": 0.25}, "crashed", SHOWN["crashed"]) == "crashed 25.0%"
    assert _shown({"crashed": 0.0}, "crashed", SHOWN["crashed"]) is None


def test_the_file_of_tracebacks_is_bounded_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cret/value")
    log = CrashLog(tmp_path / "crashes.log")
    sentences = [log.record(f"sample {n}", ValueError("https://x?key=s3cret%2Fvalue " + "y" * 100_000)) for n in range(100)]
    kept = (tmp_path / "crashes.log").read_text(encoding="utf-8")
    assert len(kept) <= MOST_BYTES and kept.count("====") == kept.count("Error: ") < 100 == log.count
    assert "s3cret" not in kept + sentences[0] and "key=***" in sentences[0]
    assert max(map(len, sentences)) < 500 and len(kept) / kept.count("====") < MOST_CHARS + 200
    assert "crashes.log" in sentences[0] and "crashes.log" not in sentences[-1], "what was not kept is not promised"


def test_a_folder_that_cannot_be_written_and_an_exception_that_cannot_be_shown_are_no_second_crash(tmp_path: Path) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    (tmp_path / "file").touch()
    assert "Broken" in CrashLog(tmp_path / "file" / "crashes.log").record("sample 0", Broken())
    assert CrashLog(None).record("sample 0", ValueError("x")) == "ValueError: x"
