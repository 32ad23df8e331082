"""The agent loop and the rollouter, with scripted completions and a scripted search."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from patient import PatientLoop
from patient import run as on_patient_loop
from search_server import KEY, KEY_VARIABLE, Asked, serving, settings
from test_chat import tokenizer

from igpo_megatron.agent.rollouter import Rollouter, RolloutFailure
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.agent.trajectory import counter_seed
from igpo_megatron.algorithms.info_gain import add_probes, rendered_probes
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.load import build
from igpo_megatron.data.corpus import Passage
from igpo_megatron.engines.api import EngineError, EnginesEnded
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.search import http
from igpo_megatron.search.client import make_client
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus, SearchStopped
from igpo_megatron.tools.base import HIT, Tool
from igpo_megatron.tools.search_tool import SearchTool, render_results
from igpo_megatron.training.evaluate import evaluate
from igpo_megatron.types import Completion, ProbeScore, Prompt, RolloutGroup, RunStopped, SamplingRequest, Status

WORDS = tokenizer()
ANSWER = "<think>I can answer now.</think>\n<answer>Rome</answer>"
SEARCH = '<think>x</think><tool_call>{"name": "search", "arguments": {"query": "capital of Italy"}}</tool_call>'
SETTINGS = {
    "force_think": False,
    "tool_in_prompt": False,
    "tool_name": "search",
    "max_turns": 3,
    "max_context": 400,
    "max_tokens_per_turn": 60,
}


def completion(text: str, finish: str = "stop") -> Completion:
    ids = [*WORDS.encode(text, add_special_tokens=False), *([WORDS.eos_token_id] if finish == "stop" else [])]
    return Completion(ids, [-0.5] * len(ids), finish, weight_version=7)  # type: ignore[arg-type]


class ScriptedEngine:
    """Says line k of the script in turn k; remembers what it was asked."""

    def __init__(self, *script: str | Completion | Exception) -> None:
        self.script = script
        self.calls: list[tuple[list[int], int, int]] = []
        self.probed: list[tuple[list[int], int, int]] = []
        self.finished = 0
        self.broken_probe: int | None = None

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        self.probed.append((token_ids, first, self.finished))
        if self.broken_probe is not None and first > self.broken_probe:
            raise EngineError("engine 0 died or refused: gone")
        await asyncio.sleep(0.01)
        return ProbeScore(tuple(-1.0 for _ in token_ids[first:]), 7)

    async def pause(self) -> None:
        await asyncio.sleep(0.005)

    async def generate(self, request: SamplingRequest) -> Completion:
        assert not request.top_logprobs, "nothing here needs entropies"
        self.calls.append((request.token_ids, request.max_tokens, request.seed))
        await self.pause()
        self.finished += 1
        text = WORDS.decode(request.token_ids)
        line = self.script[text.count("</tool_response>")]
        if isinstance(line, Exception):
            raise line
        return line if isinstance(line, Completion) else completion(line)


def searching(client: SearchClient, hit: str = HIT) -> dict[str, Tool]:
    """Search alone, over that client."""
    return {"search": SearchTool(client, hit)}


class ScriptedSearch:
    def __init__(self, status: SearchStatus = SearchStatus.OK, text: str = "Rome is the capital of Italy.") -> None:
        self.status, self.text = status, text
        self.queries: list[str] = []

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        self.queries += queries
        found = (Passage("1", "Italy", self.text),) if self.status is SearchStatus.OK else ()
        return [SearchResult(query, self.status, "scripted", found, None if self.status.is_answer else "HTTP 500") for query in queries]

    async def close(self) -> None: ...


def run(
    engine: object,
    search: ScriptedSearch | None = None,
    *,
    samples: int = 1,
    prompts: int = 1,
    reward: Reward | None = None,
    probe: bool = False,
    **changes: object,
) -> list[RolloutGroup]:
    config = Rollout(**{"max_failed_fraction": 1.0, **SETTINGS, **changes})  # type: ignore[arg-type]
    form = ChatFormat(WORDS, config, reward or Reward())
    probes_of = partial(rendered_probes, render_probe=form.render_probe, config=reward or Reward())
    questions = [Prompt(f"q{number}", "What is the capital of Italy?", ("Rome",), "test") for number in range(prompts)]
    with Rollouter(engine, searching(search or ScriptedSearch()), form, config, seed=1, probes_of=probes_of) as rollouter:  # type: ignore[arg-type]
        return rollouter.start(rollouter.run(questions, samples=samples, salt=1, temperature=None, probe=probe)).result()


def test_what_ends_every_engine_stops_the_rollout_by_its_own_sentence() -> None:
    with pytest.raises(EnginesEnded, match=r"^Ray ended on this machine: its raylet died$"):
        run(ScriptedEngine(SEARCH, EnginesEnded("Ray ended on this machine: its raylet died")), samples=4)


def test_a_trajectory_searches_reads_and_answers() -> None:
    engine, search = ScriptedEngine(SEARCH, ANSWER), ScriptedSearch()
    (group,) = run(engine, search)
    (end,) = group.trajectories
    assert (end.status, end.answer) == (Status.FINISHED, "Rome")
    assert [group.nodes[index].kind for index in end.path] == ["prompt", "action", "observation", "action"]
    assert search.queries == ["capital of Italy"]
    first, second = group.actions(end)
    assert (first.turn, second.turn, first.weight_version) == (1, 2, 7)
    assert first.behavior_logprobs == [-0.5] * len(first.token_ids) and first.call is not None and second.call is None
    # Token in, token out: the second request is exactly the first one, what was sampled, and the tool message.
    assert engine.calls[1][0] == [*engine.calls[0][0], *first.token_ids, *group.nodes[end.path[2]].token_ids]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (["<think>x</think> no idea"], Status.BAD_FORMAT),
        ([completion("<think>x", "length")], Status.TRUNCATED_TOKENS),
        ([SEARCH, SEARCH, SEARCH], Status.TRUNCATED_TURNS),
        ([EngineError("engine 0 died")], Status.ENGINE_FAILED),
        ([completion("<think>x", "abort")], Status.ENGINE_FAILED),
    ],
)
def test_every_other_end_has_its_status(script: list[str | Completion | Exception], status: Status) -> None:
    search = ScriptedSearch()
    (group,) = run(ScriptedEngine(*script), search)
    assert group.trajectories[0].status is status
    if status is Status.TRUNCATED_TURNS:
        assert len(search.queries) == 2, "the call of the last turn is not run"


@pytest.mark.parametrize("status", [SearchStatus.ERROR, SearchStatus.TIMEOUT, SearchStatus.RATE_LIMITED])
def test_a_failed_search_ends_the_trajectory_and_is_never_shown_as_empty(status: SearchStatus) -> None:
    (group,) = run(ScriptedEngine(SEARCH, ANSWER), ScriptedSearch(status))
    (end,) = group.trajectories
    assert end.status is Status.TOOL_FAILED and "scripted" in end.reason and "HTTP 500" in end.reason
    assert all(node.kind != "observation" for node in group.nodes)


def test_a_failed_search_may_end_its_trajectory_as_it_stands() -> None:
    (group,) = run(ScriptedEngine(SEARCH, ANSWER), ScriptedSearch(SearchStatus.TIMEOUT), failed_search="end")
    (end,) = group.trajectories
    assert end.status is Status.ENDED_BY_TOOL and end.status.is_trainable and end.status.is_failure and end.answer is None
    score(group, build({"model": {"path": "m"}}, ["reward.format_penalty=-2"]))
    assert end.reward == -2.0 and rollout_metrics([group])["failed"] == 1.0


def test_an_empty_result_is_shown_as_one() -> None:
    (group,) = run(ScriptedEngine(SEARCH, ANSWER), ScriptedSearch(SearchStatus.EMPTY))
    assert [node.text for node in group.nodes if node.kind == "observation"] == ["No results."]


def test_an_unknown_tool_is_told_which_one_exists() -> None:
    wrong = SEARCH.replace('"search"', '"browse"')
    search = ScriptedSearch()
    (group,) = run(ScriptedEngine(wrong, ANSWER), search)
    shown = next(node.text for node in group.nodes if node.kind == "observation")
    assert "browse" in shown and "search" in shown and search.queries == []


@pytest.mark.parametrize("max_context", [120, 200, 300])
def test_every_context_leaves_room_for_its_longest_probe(max_context: int) -> None:
    engine = ScriptedEngine(*[SEARCH] * 9, ANSWER)
    reward = Reward(probe_template="<answer>{answer}</answer>")
    (group,) = run(engine, ScriptedSearch(text="Rome is a city. " * 40), max_context=max_context, max_turns=10, reward=reward)
    probe = len(ChatFormat(WORDS, Rollout(), reward).render_probe("Rome")[0])
    assert group.trajectories[0].status is Status.TRUNCATED_CONTEXT
    for token_ids, max_tokens, _ in engine.calls:
        assert len(token_ids) + max_tokens + probe <= max_context
    assert all(len(group.context(index)) + probe <= max_context for index in range(len(group.nodes)) if group.nodes[index].kind != "action")


@pytest.mark.parametrize("force_think", [False, True])
def test_a_question_without_room_for_one_token_of_a_turn_is_left_out_and_said_once(
    force_think: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its prompt, the forced opening and the longest probe fill the context; one token more leaves room for one."""
    reward = Reward(probe_template="<answer>{answer}</answer>")
    form = ChatFormat(WORDS, Rollout(**{**SETTINGS, "force_think": force_think}), reward)  # type: ignore[arg-type]
    question = "What is the capital of Italy?"
    filled = len(form.open(question)[0]) + len(form.opening(1)[0]) + len(form.render_probe("Rome")[0])
    engine = ScriptedEngine(ANSWER)
    assert run(engine, prompts=2, max_context=filled, reward=reward, force_think=force_think) == [] and engine.calls == []
    (warning,) = caplog.records
    assert f"rollout.max_context={filled}" in warning.getMessage() and "question q0" in warning.getMessage()
    (group,) = run(ScriptedEngine(completion("Rome", "length")), max_context=filled + 1, reward=reward, force_think=force_think)
    assert len(group.actions(group.trajectories[0])) == 1


def test_an_evaluation_counts_the_questions_that_leave_no_room_for_a_turn_and_scores_the_others(tmp_path: Path) -> None:
    config = build({"model": {"path": "m"}, "rollout": SETTINGS}, ["rollout.max_failed_fraction=1"])
    form = ChatFormat(WORDS, config.rollout, config.reward)
    short, long = (Prompt(str(words), "What is it? " * words, ("Rome",), "test") for words in (1, 400))
    with Rollouter(ScriptedEngine(ANSWER), searching(ScriptedSearch()), form, config.rollout, seed=1) as rollouter:  # type: ignore[arg-type]
        greedy = evaluate(rollouter, [short, long], config, step=0, version=7, folder=tmp_path)["greedy"]
        assert (greedy["too_long"], greedy["questions"], greedy["em"]) == (1, 1, 1.0)
        nothing = evaluate(rollouter, [long], config, step=1, version=7, folder=tmp_path)["greedy"]
        assert (nothing["too_long"], nothing["questions"]) == (1, 0)


class Evaluated(ScriptedEngine):
    """Answers once `together` turns wait for it, with weights of version 3; the greedy turn may be refused."""

    def __init__(self, together: int, refused: RunStopped | None = None) -> None:
        super().__init__(ANSWER)
        self.temperatures: list[float] = []
        self.all_here, self.together, self.refused, self.cancelled = asyncio.Event(), together, refused, 0

    async def generate(self, request: SamplingRequest) -> Completion:
        self.temperatures.append(request.temperature)
        if len(self.temperatures) == self.together:
            self.all_here.set()
        if self.refused is not None and request.temperature == 0:
            raise self.refused
        try:
            await asyncio.wait_for(self.all_here.wait(), 60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return replace(await super().generate(request), weight_version=3)


def evaluating(engine: Evaluated, folder: Path, version: int, on_progress: Callable[[float], None] | None = None) -> dict[str, Any]:
    """Two questions, each sampled three times and answered greedily once."""
    config = build({"model": {"path": "m"}, "rollout": SETTINGS}, ["eval.samples=3", "eval.greedy=true"])
    form = ChatFormat(WORDS, config.rollout, config.reward)
    prompts = [Prompt(name, "What is it?", ("Rome",), "test") for name in "ab"]
    with Rollouter(engine, searching(ScriptedSearch()), form, config.rollout, seed=1) as rollouter:  # type: ignore[arg-type]
        return evaluate(rollouter, prompts, config, step=3, version=version, folder=folder, on_progress=on_progress)


def test_an_evaluation_asks_all_kinds_at_once_and_reports_the_share_of_all(tmp_path: Path) -> None:
    shares: list[float] = []
    report = evaluating(Evaluated(together=8), tmp_path, 3, shares.append)
    assert (report["sampled"]["samples"], report["greedy"]["samples"], report["sampled"]["em"]) == (3, 1, 1.0)
    assert shares == pytest.approx([number / 8 for number in range(1, 9)])


def test_an_evaluation_that_other_weights_answered_is_no_evaluation_of_these(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"after step 3 was given turns of the weights \['3'\], expected 2"):
        evaluating(Evaluated(together=8), tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_whose_greedy_part_fails_ends_the_sampled_part(tmp_path: Path) -> None:
    engine = Evaluated(together=99, refused=RunStopped("no engine is left"))
    with pytest.raises(RunStopped, match="no engine is left"):
        evaluating(engine, tmp_path, 3)
    assert engine.cancelled == 6


def test_forced_tokens_are_nodes_of_their_own_and_shared_by_the_samples() -> None:
    (group,) = run(ScriptedEngine(ANSWER.removeprefix("<think>")), force_think=True, samples=3)
    assert [node.kind for node in group.nodes] == ["prompt", "forced", "action", "action", "action"]
    assert all(end.status is Status.FINISHED and end.path[:2] == [0, 1] for end in group.trajectories)


def test_seeds_depend_on_what_is_sampled_and_on_nothing_else() -> None:
    engines = [ScriptedEngine(SEARCH, ANSWER) for _ in range(2)]
    for engine in engines:
        run(engine, samples=4, prompts=2)
    seeds = [sorted(seed for _, _, seed in engine.calls) for engine in engines]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 16
    assert counter_seed(1, 2, "q", 0, 1) != counter_seed(1, 2, "q", 1, 0)


def test_a_question_that_comes_again_in_a_step_is_sampled_with_other_seeds() -> None:
    """Drawn twice at the end of an epoch, or again in place of a group that taught nothing: never the same group once more."""
    form = ChatFormat(WORDS, Rollout(**SETTINGS), Reward())  # type: ignore[arg-type]
    question = Prompt("q0", "What is the capital of Italy?", ("Rome",), "test")
    other = replace(question, id="q1")

    def seeds(*steps: tuple[int, list[list[Prompt]]]) -> list[int]:
        engine = ScriptedEngine(ANSWER)
        with Rollouter(engine, searching(ScriptedSearch()), form, Rollout(**SETTINGS), seed=1) as rollouter:  # type: ignore[arg-type]
            for step, calls in steps:
                asked: Counter[str] = Counter()
                for prompts in calls:
                    work = rollouter.run(prompts, samples=2, salt=step, temperature=None, asked=asked)
                    rollouter.start(work).result()
        return [seed for _, _, seed in engine.calls]

    once = seeds((1, [[question]]))
    assert once == [counter_seed(1, 1, "q0", sample, 1) for sample in (0, 1)], "asked once, a question has the seeds it always had"
    twice = seeds((1, [[question, other, question]]))
    assert len(set(twice)) == 6 and set(once) < set(twice) and set(seeds((1, [[other]]))) < set(twice)
    again = seeds((1, [[question, other], [question]]))
    assert set(again) == set(twice), "in place of a group of the same step it counts as the second, too; a resumed run repeats it"
    assert len(set(seeds((1, [[question] * 3]), (2, [[question] * 3])))) == 12
    with Rollouter(ScriptedEngine(ANSWER), searching(ScriptedSearch()), form, Rollout(**SETTINGS), seed=1) as rollouter:  # type: ignore[arg-type]
        rollouter.start(rollouter.run([question, question], samples=1, salt=-2, temperature=None)).result()
        calls = rollouter._agent.engine.calls  # type: ignore[attr-defined]
    assert len({seed for _, _, seed in calls}) == 2, "so it is in an evaluation of a file that holds a question twice"


def test_a_slow_trajectory_holds_up_no_other() -> None:
    """The first request is answered only when seven others have finished both their turns."""

    class OneSlow(ScriptedEngine):
        def __init__(self) -> None:
            super().__init__(SEARCH, ANSWER)
            self.fast_are_done = asyncio.Event()

        async def generate(self, request: SamplingRequest) -> Completion:
            number = len(self.calls)
            result = await super().generate(request)
            if number == 0:
                await self.fast_are_done.wait()
            elif len(self.calls) == 1 + 14:
                self.fast_are_done.set()
            return result

    (group,) = run(OneSlow(), samples=8, deadline_s=20)
    assert all(end.status is Status.FINISHED for end in group.trajectories)


def test_a_trajectory_past_its_deadline_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncio.new_event_loop", PatientLoop)  # the other one ends in time, however slow the machine is

    class NeverFirst(ScriptedEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            if not self.calls:
                self.calls.append((request.token_ids, 0, 0))
                await asyncio.Event().wait()
            return await super().generate(request)

    (group,) = run(NeverFirst(ANSWER), samples=2, deadline_s=0.3)
    assert [end.status for end in group.trajectories] == [Status.ENGINE_FAILED, Status.FINISHED]
    assert "deadline" in group.trajectories[0].reason


def test_too_many_failures_stop_the_run_and_name_the_culprit() -> None:
    with pytest.raises(RolloutFailure, match=r"4 of 4 trajectories failed.*scripted.*HTTP 500"):
        run(ScriptedEngine(SEARCH), ScriptedSearch(SearchStatus.ERROR), samples=4, max_failed_fraction=0.5)


@pytest.mark.parametrize("failed_search", ["mask", "end"])
def test_too_many_failed_searches_stop_the_run_even_where_few_trajectories_search(failed_search: str) -> None:
    class OneSearches(ScriptedEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            self.calls.append((request.token_ids, 0, 0))
            return completion(SEARCH if len(self.calls) == 1 else ANSWER)

    with pytest.raises(RolloutFailure, match=r"1 of 1 searches failed.*max_failed_fraction=0\.5.*scripted: rate_limited: HTTP 500"):
        run(OneSearches(), ScriptedSearch(SearchStatus.RATE_LIMITED), samples=4, max_failed_fraction=0.5, failed_search=failed_search)


def test_a_search_that_only_a_person_can_help_stops_the_run_and_leaves_nothing_running() -> None:
    class Refused(ScriptedSearch):
        async def search(self, queries: Sequence[str]) -> list[SearchResult]:
            self.queries += queries
            if len(self.queries) < 3:
                await asyncio.Event().wait()
            raise SearchStopped("search.backend=serper refuses the key in SERPER_API_KEY")

    async def call() -> int:
        config = Rollout(**SETTINGS)  # type: ignore[arg-type]
        rollouter = Rollouter(ScriptedEngine(SEARCH), searching(Refused()), ChatFormat(WORDS, config, Reward()), config, seed=0)
        rollouter._loop.close()
        with pytest.raises(SearchStopped, match="SERPER_API_KEY"):
            await rollouter.run([Prompt("q", "?", ("a",), "t")], samples=4, salt=1, temperature=None)
        return len(asyncio.all_tasks())

    assert asyncio.run(call()) == 1, "the caller alone"


def test_200_trajectories_end_in_time_while_the_provider_fails_every_third_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trajectory saw is what the provider said, or it ended as failed; nothing waits for ever."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(http, "_backoff", lambda state: 0.001)

    class Curious(ScriptedEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            await asyncio.sleep(0.005)
            turn = WORDS.decode(request.token_ids).count("</tool_response>")
            return completion(ANSWER if turn == 2 else SEARCH.replace("capital of Italy", f"q {request.seed % 97} {turn}"))

    def fault(asked: Asked) -> str | None:
        draw = random.Random(f"{asked.queries}|{asked.number}")
        return draw.choice(("500", "429", "html", "broken", "reset", "never", "slow")) if draw.random() < 0.3 else None

    async def call() -> list[RolloutGroup]:
        config = Rollout(**{**SETTINGS, "max_turns": 4, "max_failed_fraction": 0.5, "deadline_s": 30.0})  # type: ignore[arg-type]
        async with serving(fault) as server:
            search = make_client(settings("serper", server, attempts=2, timeout_s=1.5, top_k=1))
            rollouter = Rollouter(Curious(), searching(search), ChatFormat(WORDS, config, Reward()), config, seed=0)
            rollouter._loop.close()
            questions = [Prompt(f"q{number}", "?", ("Rome",), "test") for number in range(25)]
            groups = await rollouter.run(questions, samples=8, salt=1, temperature=None)
            await search.close()
            return groups

    groups = on_patient_loop(call())
    ends = Counter(end.status for group in groups for end in group.trajectories)
    assert sum(ends.values()) == 200 and set(ends) == {Status.FINISHED, Status.TOOL_FAILED} and ends[Status.FINISHED] > 100
    for group in groups:
        for end in group.trajectories:
            nodes = [group.nodes[index] for index in end.path]
            for action, seen in zip(nodes[1::2], nodes[2::2], strict=False):
                assert action.call is not None
                assert f"What source 0 has to say about {action.call.queries[0]}" in seen.text


def test_a_replayed_step_has_the_same_trajectories_without_the_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    class Choosy(ScriptedEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            await asyncio.sleep(random.random() / 100)  # an order of its own in every run
            said = WORDS.decode(request.token_ids).count("source 0")
            return completion(ANSWER if request.seed % 3 == 0 or said == 2 else SEARCH.replace("capital of Italy", f"q {request.seed % 7}"))

    async def step(mode: str) -> tuple[list[RolloutGroup], int]:
        config = Rollout(**SETTINGS)  # type: ignore[arg-type]
        async with serving() as server:
            search = make_client(settings("serper", server, mode=mode, cache=tmp_path / "record.sqlite", top_k=1))
            rollouter = Rollouter(Choosy(), searching(search), ChatFormat(WORDS, config, Reward()), config, seed=3)
            rollouter._loop.close()
            groups = await rollouter.run([Prompt("q", "?", ("Rome",), "test")], samples=32, salt=1, temperature=None)
            await search.close()
            return groups, len(server.asked)

    def paths(groups: list[RolloutGroup]) -> list[list[str]]:
        return [[group.nodes[index].text for index in end.path] for group in groups for end in group.trajectories]

    (recorded, asked), (replayed, asked_again) = on_patient_loop(step("record")), on_patient_loop(step("replay"))
    assert paths(replayed) == paths(recorded) and 0 < asked <= 7 and asked_again == 0


def test_progress_reaches_the_end() -> None:
    seen: list[float] = []
    report: Callable[[float], None] = seen.append
    config = Rollout(**SETTINGS)  # type: ignore[arg-type]
    with Rollouter(ScriptedEngine(ANSWER), searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=0) as rollouter:
        rollouter.start(rollouter.run([Prompt("q", "?", ("a",), "t")], samples=4, salt=1, temperature=None, on_progress=report)).result()
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_results_are_numbered_and_several_queries_have_headings() -> None:
    one = SearchResult("a", SearchStatus.OK, "x", (Passage("1", "t", "first"), Passage("2", "t", "second")))
    none = SearchResult("b", SearchStatus.EMPTY, "x")
    assert render_results([one]) == "(1) first\n(2) second"
    assert render_results([one, none]) == "Results for: a\n(1) first\n(2) second\n\nResults for: b\nNo results."


class InStep(ScriptedEngine):
    """Ends turns together, as many as it is told, once all have begun."""

    def __init__(self, together: int, *script: str) -> None:
        super().__init__(*script)
        self.together, self.begun, self.go = together, 0, asyncio.Event()

    async def pause(self) -> None:
        go = self.go
        self.begun += 1
        if self.begun % self.together == 0:
            self.go = asyncio.Event()
            asyncio.get_running_loop().call_later(0.005, go.set)
        await go.wait()


def test_each_state_is_probed_once_beside_the_turn_that_continues_it() -> None:
    engine = InStep(3, SEARCH, ANSWER)
    (group,) = run(engine, samples=3, probe=True)
    probe, (start, stop) = ChatFormat(WORDS, Rollout(**SETTINGS), Reward()).render_probe("Rome")  # type: ignore[arg-type]
    # The prompt once for all samples, and one state after each sample's search.
    assert len(engine.probed) == 4
    assert all(token_ids[first - start :] == probe[:stop] for token_ids, first, _ in engine.probed)
    asked = [token_ids for token_ids, *_ in engine.calls]
    assert sorted(token_ids[: first - start] for token_ids, first, _ in engine.probed) == sorted(
        [asked[0], *(ids for ids in asked if ids != asked[0])]
    )
    # Each was sent before the turn beside it had ended: the prompt's before any, the others after the three first turns.
    assert [finished for *_, finished in engine.probed] == [0, 3, 3, 3]
    add_probes(group, lambda answer: (probe, (start, stop)), Reward())
    scored = [node for node in group.nodes if node.kind == "probe"]
    assert len(scored) == 4 and all(node.old_logprobs == [-1.0] * (stop - start) and node.weight_version == 7 for node in scored)


def test_a_rollout_that_is_not_asked_to_probe_does_not() -> None:
    engine = ScriptedEngine(SEARCH, ANSWER)
    (group,) = run(engine)
    assert engine.probed == [] and group.probe_scores == {}


def test_a_failing_probe_fails_its_trajectory_as_a_failing_turn_does() -> None:
    engine = ScriptedEngine(SEARCH, ANSWER)
    engine.broken_probe = 60  # the prompt is shorter, the state after the search longer
    (group,) = run(engine, probe=True)
    (end,) = group.trajectories
    assert end.status is Status.ENGINE_FAILED and "gone" in end.reason
