"""Groups that grow as trees, with scripted completions: who forks, where, with which chance, and that nothing is left over."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_rollouts import ANSWER, SEARCH, SETTINGS, WORDS, ScriptedSearch, completion, searching

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.agent.settings import AepoBranching, ArpoBranching, Rollout
from igpo_megatron.agent.trees.entropy import branch_probability, initial_rollouts, step_entropy
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.engines.actor import entropy
from igpo_megatron.engines.api import EngineError
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.observability.report.page import write_report
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.observability.tree_picture import tree_picture
from igpo_megatron.types import Completion, Prompt, RolloutGroup, SamplingRequest, Status

CALM, UNSURE = 0.1, 1.0
"""Nats per token."""


class UnsureEngine:
    """Searches `searches` times, then answers; how sure it is at the beginning of turn t says `nats[t - 1]`.

    Requests for the rest of a turn go on where the first tokens ended, as a sampler's would.
    """

    def __init__(self, *nats: float, searches: int = 1, wait: Sequence[float] = ()) -> None:
        self.nats, self.searches, self.wait = nats, searches, wait
        self.calls: list[tuple[list[int], int, int, int]] = []

    async def generate(self, request: SamplingRequest) -> Completion:
        number = len(self.calls)
        self.calls.append((request.token_ids, request.max_tokens, request.seed, request.top_logprobs))
        await asyncio.sleep(self.wait[number] if number < len(self.wait) else 0.002)
        text = WORDS.decode(request.token_ids)
        turn = text.count("</tool_response>")
        whole = completion(SEARCH if turn < self.searches else ANSWER).token_ids
        done = next(n for n in range(len(whole), -1, -1) if n == 0 or request.token_ids[-n:] == whole[:n])
        ids = whole[done : done + request.max_tokens]
        finish = "stop" if ids[-1:] == whole[-1:] else "length"
        return Completion(ids, [-0.5] * len(ids), finish, 7, [self.nats[turn]] * len(ids) if request.top_logprobs else [])  # type: ignore[arg-type]


def grow(
    engine: object, branching: ArpoBranching, samples: int = 8, *, prompts: int = 1, seed: int = 1, **changes: object
) -> list[RolloutGroup]:
    config = Rollout(**{**SETTINGS, "max_failed_fraction": 1.0, "branching": branching, **changes})  # type: ignore[arg-type]
    questions = [Prompt(f"q{number}", "What is the capital of Italy?", ("Rome",), "test") for number in range(prompts)]
    with Rollouter(engine, searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=seed) as rollouter:  # type: ignore[arg-type]
        return rollouter.start(rollouter.run(questions, samples=samples, salt=1, temperature=None, branch=True)).result()


THRESHOLD = {"initial_rollouts": 2, "entropy_tokens": 4, "decision": "threshold", "threshold": 0.5}


def test_entropy_is_a_sum_over_the_first_tokens_in_units_of_the_vocabulary() -> None:
    assert entropy([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy([math.log(0.5), -math.inf]) == pytest.approx(0.5 * math.log(2)), "what top-k leaves out counts nothing"
    published, corrected = ArpoBranching(variant="published", entropy_tokens=4), ArpoBranching(entropy_tokens=4)
    assert step_entropy([1.0] * 9, published, 100) == step_entropy([1.0] * 9, corrected, 100) == pytest.approx(4 / math.log(100))
    # A segment of one token looks four times as sure by the published sum.
    assert step_entropy([1.0], published, 100) == pytest.approx(1 / math.log(100))
    assert step_entropy([1.0], corrected, 100) == pytest.approx(4 / math.log(100))


def test_the_chance_of_a_fork_by_hand() -> None:
    arpo = ArpoBranching(base_probability=0.5, entropy_weight=0.2)
    assert branch_probability(0.0, 9, arpo) == 0.5 and branch_probability(1.0, 0, arpo) == pytest.approx(0.7)
    assert branch_probability(9.0, 0, arpo) == 1.0 and branch_probability(-9.0, 0, arpo) == 0.0
    aepo = AepoBranching(base_probability=0.5, entropy_weight=0.2, penalty=0.05)
    assert branch_probability(1.0, 2, aepo) == pytest.approx(0.7 * 0.9)
    published = AepoBranching(base_probability=0.5, entropy_weight=0.2, penalty=0.05, variant="published")
    assert [round(branch_probability(0.0, count, published), 3) for count in (0, 1, 5, 10, 20, 30)] == [0.5, 0.474, 0.333, 0.0, 0.0, 0.0]


def test_the_published_chance_is_what_the_published_comparison_does() -> None:
    """x = clip((U + w dH) max(0, 1 - 0.05 c), 0, 1); fork iff x >= bp, counted over a grid of U."""
    for rise, count in ((0.0, 1), (0.3, 4), (-0.2, 2)):
        config = AepoBranching(base_probability=0.5, entropy_weight=0.2, variant="published")
        grid = [(index + 0.5) / 4000 for index in range(4000)]
        forks = sum(min(max((u + 0.2 * rise) * max(0.0, 1 - 0.05 * count), 0.0), 1.0) >= 0.5 for u in grid) / len(grid)
        # The weight stands inside the damping there and P = 1 - bp/f + w dH outside of it: both say U >= bp/f - w dH.
        assert branch_probability(rise, count, config) == pytest.approx(forks, abs=1e-3)


def test_the_budget_by_hand() -> None:
    published, corrected = AepoBranching(variant="published"), AepoBranching(budget_scale=2.0)
    assert initial_rollouts(0.5, [0.5, 0.5], 16, published) == 9 and initial_rollouts(0.5, [0.5], 12, published) == 7
    assert initial_rollouts(1.0, [0.0, 0.0], 10, corrected) == 9  # 10 sigmoid(2) = 8.8
    assert initial_rollouts(0.0, [1.0], 10, corrected) == 1  # 10 sigmoid(-2) = 1.2
    assert initial_rollouts(0.3, [], 8, corrected) == 4


def test_paths_fork_before_the_first_tokens_behind_a_result_where_entropy_rose() -> None:
    engine = UnsureEngine(CALM, UNSURE)
    (group,) = grow(engine, ArpoBranching(**THRESHOLD), samples=4)  # type: ignore[arg-type]
    assert [end.status for end in group.trajectories] == [Status.FINISHED] * 4
    assert [point.trajectory for point in group.branch_points] == [0, 1]
    assert [point.children for point in group.branch_points] == [(2,), (3,)]
    for point in group.branch_points:
        assert group.nodes[point.node].kind == "observation" and point.turn == 2 and point.kind == "top_k"
        assert point.initial == pytest.approx(4 * CALM / math.log(len(WORDS)))
        assert point.probability == pytest.approx(0.5 + 0.2 * (point.entropy - point.initial))
        parent, (child,) = group.trajectories[point.trajectory], point.children
        shared = group.trajectories[child].path
        assert shared[:3] == parent.path[:3] and shared[3] != parent.path[3] and shared[2] == point.node
    assert group.is_branched
    # Two samples of the first turn serve four trajectories.
    assert sum(node.kind == "action" and node.turn == 1 for node in group.nodes) == 2


def test_where_entropy_does_not_rise_the_missing_paths_begin_at_the_question_all_at_once() -> None:
    engine = UnsureEngine(UNSURE, CALM)
    (group,) = grow(engine, ArpoBranching(**THRESHOLD), samples=7)  # type: ignore[arg-type]
    assert len(group.trajectories) == 7 and not group.is_branched
    assert all(not point.children for point in group.branch_points) and len(group.branch_points) == 2
    begun = [number for number, call in enumerate(engine.calls) if call[0] == group.nodes[0].token_ids]
    assert begun[2:] == list(range(begun[2], begun[2] + 5)), "the five late ones start side by side"


def test_first_tokens_and_the_rest_make_one_turn_and_only_the_first_are_asked_for_entropies() -> None:
    engine = UnsureEngine(CALM, CALM)
    (group,) = grow(engine, ArpoBranching(**THRESHOLD, top_k=5), samples=2)  # type: ignore[arg-type]
    actions = group.actions(group.trajectories[0])
    assert [node.text for node in actions] == [WORDS.decode(completion(text).token_ids[:-1]) for text in (SEARCH, ANSWER)]
    assert all(len(node.behavior_logprobs) == len(node.token_ids) for node in actions)
    assert {(call[1], call[3]) for call in engine.calls if call[3]} == {(4, 5)}
    assert {call[1] for call in engine.calls if not call[3]} == {SETTINGS["max_tokens_per_turn"] - 4}
    full = UnsureEngine(CALM, CALM)
    (group,) = grow(full, ArpoBranching(**THRESHOLD, entropy="full"), samples=4)  # type: ignore[arg-type]
    assert {call[3] for call in full.calls} == {-1, 0} and group.branch_points[0].kind == "full"


def test_a_stop_string_across_the_seam_ends_the_turn_wherever_the_seam_is() -> None:
    """vLLM looks for stop strings in the text of one request; the second one would run past a tag that the first began."""
    call, more = "<think>x</think>\n<search>capital of Italy</search>", " and <think>on it goes"
    answer = "<think>I know.</think>\n<answer>\\boxed{Rome}</answer>"

    class Tagged(UnsureEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            text = WORDS.decode(request.token_ids)
            line = completion(answer if "</result>" in text else call + more).token_ids
            done = next(n for n in range(len(line), -1, -1) if n == 0 or request.token_ids[-n:] == line[:n])
            ids = line[done : done + request.max_tokens]
            for stop in range(1, len(ids) + 1):  # as vLLM does: in the text of this request alone
                if "</search>" in WORDS.decode(ids[:stop]):
                    return Completion(ids[:stop], [-0.5] * stop, "stop", 7, [CALM] * stop)
            finish = "stop" if ids[-1:] == line[-1:] else "length"
            return Completion(ids, [-0.5] * len(ids), finish, 7, [CALM] * len(ids))  # type: ignore[arg-type]

    whole = len(WORDS.encode(call, add_special_tokens=False))
    for tokens in range(1, whole + 2):
        branching = ArpoBranching(initial_rollouts=1, entropy_tokens=tokens)
        (group,) = grow(Tagged(), branching, samples=1, protocol="arpo")
        first, last = group.actions(group.trajectories[0])
        assert first.text == call and len(first.token_ids) == len(first.behavior_logprobs), f"seam behind {tokens} tokens"
        assert first.call is not None and first.call.queries == ("capital of Italy",) and last.text == answer


def test_a_group_never_grows_past_its_size_and_a_wide_beam_forks_more_at_once() -> None:
    engine = UnsureEngine(CALM, UNSURE, UNSURE, searches=2)
    (group,) = grow(engine, ArpoBranching(**THRESHOLD, beam=4), samples=6)  # type: ignore[arg-type]
    assert len(group.trajectories) == 6 and [len(point.children) for point in group.branch_points] == [3, 1]


def test_the_published_variant_looks_at_the_turn_that_made_the_call() -> None:
    """At the first call that is the first turn itself, so nothing has risen; the paper's entropy, behind the result, has."""
    nats = (CALM, UNSURE, CALM)
    (published,) = grow(UnsureEngine(*nats, searches=2), ArpoBranching(**THRESHOLD, variant="published"), samples=4)  # type: ignore[arg-type]
    assert [(point.turn, round(point.entropy - point.initial, 2) > 0) for point in published.branch_points[:4]] == [
        *[(2, False)] * 2,
        *[(3, True)] * 2,
    ]
    (corrected,) = grow(UnsureEngine(*nats, searches=2), ArpoBranching(**THRESHOLD), samples=4)  # type: ignore[arg-type]
    assert [point.turn for point in corrected.branch_points] == [2, 2]


def test_a_resumed_run_draws_the_same_and_another_seed_draws_differently() -> None:
    branching = ArpoBranching(initial_rollouts=4, entropy_tokens=4)
    runs = [grow(UnsureEngine(CALM, UNSURE, UNSURE, searches=2), branching, 8, prompts=2, seed=seed) for seed in (1, 1, 2)]
    points = [[group.branch_points for group in groups] for groups in runs]
    assert points[0] == points[1] != points[2]
    assert [len(group.trajectories) for group in runs[0]] == [8, 8]


def test_what_a_path_samples_depends_on_its_label_and_not_on_who_was_faster() -> None:
    branching = ArpoBranching(initial_rollouts=2, entropy_tokens=4, decision="threshold", threshold=0.0)
    first, second = UnsureEngine(CALM, UNSURE), UnsureEngine(CALM, UNSURE, wait=(0.05, 0.002))
    (one,), (other,) = (grow(engine, branching, 4) for engine in (first, second))
    assert {seed for _, _, seed, _ in first.calls} == {seed for _, _, seed, _ in second.calls}
    assert {point.trajectory: point.probability for point in one.branch_points} == {
        point.trajectory: point.probability for point in other.branch_points
    }


def test_nothing_is_left_over_from_one_question_or_step_to_the_next() -> None:
    """The published code keeps the first batch's initial entropies for ever: the same question would be judged by another's."""
    config = Rollout(**{**SETTINGS, "branching": ArpoBranching(**THRESHOLD)})  # type: ignore[arg-type]
    engine = UnsureEngine(CALM, UNSURE)
    question = [Prompt("q", "What is the capital of Italy?", ("Rome",), "test")]
    with Rollouter(engine, searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=1) as rollouter:  # type: ignore[arg-type]
        found = []
        for nats in ((CALM, UNSURE), (UNSURE, UNSURE), (CALM, UNSURE)):
            engine.nats = nats
            (group,) = rollouter.start(rollouter.run(question, samples=4, salt=1, temperature=None, branch=True)).result()
            found.append(group.branch_points)
        (plain,) = rollouter.start(rollouter.run(question, samples=4, salt=1, temperature=None)).result()
    assert found[0] == found[2] and all(not point.children for point in found[1])
    assert not plain.branch_points and not plain.is_branched, "evaluations draw independent samples"


def test_no_path_waits_for_a_slow_one() -> None:
    """The slowest first turn is its rest: the others have long forked and finished when it comes."""

    class OneSlow(UnsureEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            result = await super().generate(request)
            if not request.top_logprobs and not self.released.is_set() and not self.slow:
                self.slow = True
                await asyncio.wait_for(self.released.wait(), 60)
            if WORDS.decode([*request.token_ids, *result.token_ids]).count("</answer>"):
                self.released.set()
            return result

    engine = OneSlow(CALM, UNSURE)
    engine.released, engine.slow = asyncio.Event(), False  # type: ignore[attr-defined]
    (group,) = grow(engine, ArpoBranching(**THRESHOLD), samples=4, deadline_s=120)  # type: ignore[arg-type]
    assert [end.status for end in group.trajectories] == [Status.FINISHED] * 4


def test_a_failed_first_sample_holds_up_no_decision() -> None:
    class FirstFails(UnsureEngine):
        async def generate(self, request: SamplingRequest) -> Completion:
            if not self.calls:
                self.calls.append((request.token_ids, 0, 0, 0))
                raise EngineError("engine 0 died")
            return await super().generate(request)

    (group,) = grow(FirstFails(CALM, UNSURE), ArpoBranching(**THRESHOLD), samples=4, deadline_s=120)  # type: ignore[arg-type]
    assert [end.status for end in group.trajectories] == [Status.ENGINE_FAILED, *[Status.FINISHED] * 3]
    assert group.branch_points[0].trajectory == 1


def test_aepos_first_rollout_sets_the_budget_and_stays_in_the_group() -> None:
    """Calm behind results: H_root - H_tool > 0, so more samples begin at the question. n sigmoid(9 x 0.31) = 8 x 0.94."""
    settings = {"entropy_tokens": 4, "decision": "threshold", "budget_scale": 9.0}
    (calm,) = grow(UnsureEngine(UNSURE, CALM), AepoBranching(**settings), samples=8)  # type: ignore[arg-type]
    (unsure,) = grow(UnsureEngine(CALM, UNSURE), AepoBranching(**settings), samples=8)  # type: ignore[arg-type]

    def begun(group: RolloutGroup) -> int:
        return sum(node.kind == "action" and node.turn == 1 for node in group.nodes)

    scale = 4 * (UNSURE - CALM) / math.log(len(WORDS))
    assert begun(unsure) >= round(8 / (1 + math.exp(9 * scale))) and len(unsure.trajectories) == len(calm.trajectories) == 8
    assert not calm.is_branched and unsure.is_branched
    assert unsure.metrics["initial_rollouts"] == max(round(8 / (1 + math.exp(9 * scale))), 1) < calm.metrics["initial_rollouts"]
    assert unsure.branch_points[0].trajectory == 0, "the first rollout is forked as if it had known the budget"
    assert unsure.trajectories[0].status is Status.FINISHED


def test_forks_in_a_row_on_a_path_make_the_next_less_likely() -> None:
    branching = AepoBranching(
        premonitor=False, initial_rollouts=1, entropy_tokens=4, decision="threshold", threshold=0.3, penalty=0.4, entropy_weight=0.0
    )
    (group,) = grow(UnsureEngine(*[CALM] * 4, searches=3), branching, samples=4, max_turns=4, max_context=900)
    own = [point for point in group.branch_points if point.trajectory == 0]
    # 0.5, then 0.5 (1 - 0.4) = 0.3, which is not above the threshold, then the count is back at 0.
    assert [(point.consecutive, round(point.probability, 3), len(point.children)) for point in own] == [
        (0, 0.5, 1),
        (1, 0.3, 0),
        (0, 0.5, 1),
    ]


def test_decisions_are_written_and_read_back(tmp_path: Path) -> None:
    groups = grow(UnsureEngine(CALM, UNSURE), ArpoBranching(**THRESHOLD), samples=4)  # type: ignore[arg-type]
    write_rollouts(tmp_path / "step_000001.parquet", 1, groups)
    ((_, read),) = read_rollouts(tmp_path / "step_000001.parquet")
    assert read[0].branch_points == groups[0].branch_points and read[0].is_branched


def test_the_picture_of_a_group_by_hand(tmp_path: Path) -> None:
    """Two samples, each forked once behind its first turn: rows 0 to 3, first turns in the middle of their two rows."""
    (group,) = groups = grow(UnsureEngine(CALM, UNSURE), ArpoBranching(**THRESHOLD), samples=4)  # type: ignore[arg-type]
    picture = tree_picture(group, group.trajectories)
    assert picture is not None and (picture["turns"], picture["rows"], picture["root"]) == (2, 4, (0.0, 1.5))
    firsts = [node for node in picture["nodes"] if node["x"] == 1]
    assert [(node["y"], node["from"], node["samples"]) for node in firsts] == [(0.5, (0.0, 1.5), [1, 3]), (2.5, (0.0, 1.5), [2, 4])]
    assert sorted(node["y"] for node in picture["nodes"] if node["x"] == 2) == [0, 1, 2, 3]
    assert [(fork["x"], fork["y"], fork["samples"]) for fork in picture["forks"]] == [(1.5, 0.5, [3]), (1.5, 2.5, [4])]
    assert {leaf["sample"]: leaf["y"] for leaf in picture["leaves"]} == {0: 0, 2: 1, 1: 2, 3: 3}
    write_rollouts(tmp_path / "rollouts" / "step_000001.parquet", 1, groups)
    assert '"forks": [{' in write_report(tmp_path).read_text(encoding="utf-8")
    group.branch_points = []
    assert tree_picture(group, group.trajectories) is None


def test_metrics_of_branching_by_hand() -> None:
    """Four trajectories of a search and an answer; two of the four searches are shared."""
    groups = grow(UnsureEngine(CALM, UNSURE), ArpoBranching(**THRESHOLD), samples=4)  # type: ignore[arg-type]
    metrics = rollout_metrics(groups)
    search, answer = (len(completion(text).token_ids) for text in (SEARCH, ANSWER))
    assert (
        metrics["branched"] == 1.0
        and metrics["initial_rollouts"] == 2.0
        and metrics["shared_tokens"] == pytest.approx(2 * search / (4 * search + 4 * answer))
    )
    calm = grow(UnsureEngine(CALM), ArpoBranching(**THRESHOLD), samples=2, max_turns=1)  # type: ignore[arg-type]
    assert "branched" not in rollout_metrics(calm)
