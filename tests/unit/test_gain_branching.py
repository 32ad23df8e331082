"""Groups that fork and stop by the values of their states, with scripted completions and values that say who does what, and how likely."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
from test_rollouts import ANSWER, SETTINGS, WORDS, ScriptedSearch, completion, searching

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.agent.settings import GainBranching, Rollout
from igpo_megatron.agent.trees.gain import disagreement, fork_probability, largest_change, stop_probability
from igpo_megatron.algorithms.info_gain import add_probes, rendered_probes, turn_gains
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.load import build
from igpo_megatron.engines.api import EngineError
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.observability.report.page import write_report
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.observability.tree_picture import tree_picture
from igpo_megatron.types import Completion, ProbeScore, Prompt, RolloutGroup, SamplingRequest, Status

REWARD = Reward(probe_template="<think>I can answer now.</think>\n<answer>{answer}</answer>", scorer="engine")
ASKING = "<think>I can answer now.</think>\n<answer>"
CALL = '<tool_call>{"name": "search", "arguments": {"query": "capital of Italy"}}</tool_call>'


class KnowingEngine:
    """Sample k of the question thinks the k-th letter in every turn; the value of its state behind t turns is `values[letter][t]`.

    It searches `searches` times and then answers; asked for its answer it gives one, or `when_asked`.
    """

    def __init__(
        self,
        values: Mapping[str, Sequence[float]],
        searches: int = 1,
        *,
        asking: str = ASKING,
        when_asked: str = "Rome</answer>",
        broken: str = "",
        new_weights: int = 9,
    ) -> None:
        self.values, self.searches, self.asking, self.when_asked = values, searches, asking, when_asked
        self.broken, self.new_weights = broken, new_weights
        self.begun = 0
        self.slow: dict[str, float] = {}
        self.last = ""
        """The sample whose turns come when another one has answered."""
        self.answered = asyncio.Event()

    async def generate(self, request: SamplingRequest) -> Completion:
        text = WORDS.decode(request.token_ids)
        await asyncio.sleep(0.002)
        if text.endswith(self.asking):
            return completion(self.when_asked)
        turns, letter = self.state(text)
        if not turns:
            letter = "abcdefgh"[self.begun]
            self.begun += 1
        await asyncio.sleep(self.slow.get(letter, 0.0))
        if letter == self.last:
            await asyncio.wait_for(self.answered.wait(), 60)
        if turns < self.searches:
            return completion(f"<think>{letter}</think>{CALL}")
        self.answered.set()
        return completion(ANSWER)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        turns, letter = self.state(WORDS.decode(token_ids))
        if letter and letter == self.broken:
            raise EngineError("engine 0 died")
        value = self.values[letter or "a"][turns]
        return ProbeScore(tuple(math.log(value) for _ in token_ids[first:]), 7 if turns < self.new_weights else 8)

    @staticmethod
    def state(text: str) -> tuple[int, str]:
        """(finished turns, letter of the sample, empty at the question)."""
        turns = text.count("</tool_response>")
        return turns, text.partition("<think>")[2][:1] if turns else ""


def grow(
    engine: KnowingEngine, branching: GainBranching, samples: int, *, seed: int = 1, reward: Reward = REWARD, **changes: object
) -> RolloutGroup:
    settings = {**SETTINGS, "max_turns": 5, "max_context": 1200, "max_failed_fraction": 1.0, "branching": branching, **changes}
    config = Rollout(**settings)  # type: ignore[arg-type]
    form = ChatFormat(WORDS, config, reward)
    probes_of = partial(rendered_probes, render_probe=form.render_probe, config=reward)
    questions = [Prompt("q", "What is the capital of Italy?", ("Rome",), "test")]
    with Rollouter(engine, searching(ScriptedSearch()), form, config, seed=seed, probes_of=probes_of) as rollouter:  # type: ignore[arg-type]
        (group,) = rollouter.start(rollouter.run(questions, samples=samples, salt=1, temperature=None, probe=True, branch=True)).result()
    return group


def test_the_chance_of_a_fork_by_hand() -> None:
    config = GainBranching(base_probability=0.1, spread_weight=2.0)
    assert disagreement([0.2, 0.6]) == pytest.approx(0.2)  # mean 0.4, both 0.2 away
    assert fork_probability([0.2, 0.6], config) == pytest.approx(0.1 + 2 * 0.2)
    assert fork_probability([0.0, 1.0], config) == 1.0 and fork_probability([0.3, 0.3, 0.3], config) == pytest.approx(0.1)
    assert fork_probability([0.9], config) == fork_probability([], config) == pytest.approx(0.1), "one value disagrees with nobody"


def test_the_chance_of_a_stop_by_hand() -> None:
    config = GainBranching(stop_probability=0.8, stop_turns=2, stop_change=0.02, stop_value=0.5)
    assert largest_change([0.1, 0.80, 0.81, 0.80], 2) == pytest.approx(0.01) and largest_change([0.80, 0.81], 2) is None
    assert stop_probability([0.1, 0.80, 0.81, 0.80], config) == 0.8
    assert stop_probability([0.80, 0.81], config) == 0.0, "one quiet turn is not two"
    assert stop_probability([0.80, 0.85, 0.85], config) == 0.0, "the older of the two turns has moved it"
    assert stop_probability([0.30, 0.30, 0.30], config) == 0.0, "the answer is not known"
    assert stop_probability([0.30, 0.30, 0.30], GainBranching(stop_probability=0.8, stop_value=0.0)) == 0.8
    # A fall is a change like a rise, and the bound itself still counts as none.
    assert stop_probability([0.90, 0.75, 0.75], config) == 0.0 and stop_probability([0.5, 0.5, 0.5], config) == 0.8


def test_paths_fork_where_their_values_are_far_apart_and_nowhere_else() -> None:
    """Behind turn 1 both samples stand at 0.4; behind turn 2 at 0.1 and 0.9, a standard deviation of 0.4, so P = min(1, 2.5 x 0.4) = 1."""
    engine = KnowingEngine({"a": (0.2, 0.4, 0.1), "b": (0.2, 0.4, 0.9)}, searches=2)
    group = grow(engine, GainBranching(initial_rollouts=2, spread_weight=2.5, stop_probability=0.0), samples=4)
    assert [end.status for end in group.trajectories] == [Status.FINISHED] * 4 and group.is_branched
    by_state = {(point.trajectory, point.turn): point for point in group.value_points}
    assert set(by_state) == {(0, 2), (0, 3), (1, 2), (1, 3)}, "a fork's first state is not decided on twice"
    for number, value in ((0, 0.1), (1, 0.9)):
        calm, apart = by_state[number, 2], by_state[number, 3]
        assert (calm.probability, calm.children, calm.siblings) == (0.0, (), 2) and calm.value == pytest.approx(0.4)
        assert apart.value == pytest.approx(value) and apart.spread == pytest.approx(0.4) and apart.probability == pytest.approx(1.0)
        (child,) = apart.children
        parent, fork = group.trajectories[number].path, group.trajectories[child].path
        assert fork[:5] == parent[:5] and fork[5] != parent[5] and fork[4] == apart.node and group.nodes[apart.node].kind == "observation"


def test_a_fork_waits_for_slow_siblings_but_no_path_does() -> None:
    """Sample b is slow: a has long answered when b's value makes a's state worth a fork, which then starts from where a was."""
    engine = KnowingEngine({"a": (0.2, 0.1), "b": (0.2, 0.9)})
    engine.last = "b"
    group = grow(engine, GainBranching(initial_rollouts=2, spread_weight=2.5), samples=4)
    kinds = [(node.kind, node.turn) for node in group.nodes if node.kind in ("action", "observation")]
    assert kinds[:3] == [("action", 1), ("observation", 1), ("action", 2)], "a's answer was sampled before b's first turn was there"
    assert sorted(point.children for point in group.value_points) == [(2,), (3,)]


def test_the_draws_of_a_path_are_repeated_by_a_resumed_run_whoever_is_faster() -> None:
    values = {letter: (0.2, 0.2 + 0.1 * number, 0.5) for number, letter in enumerate("abcdefgh")}
    config = GainBranching(initial_rollouts=4, spread_weight=4.0, stop_turns=1, stop_change=0.5, stop_probability=0.5, stop_value=0.0)
    found = []
    for slow, seed in ((0.0, 1), (0.05, 1), (0.0, 2)):
        engine = KnowingEngine(values, searches=2)
        engine.slow["c"] = slow
        group = grow(engine, config, samples=6, seed=seed)
        first = {(p.trajectory, p.turn): (p.value, p.spread, p.stop_probability, p.stopped) for p in group.value_points if p.trajectory < 4}
        found.append(first)
    assert found[0] == found[1] != found[2]
    assert {stopped for *_, stopped in found[0].values()} == {True, False} and {entry[2] for entry in found[0].values()} == {0.5}


def test_a_saturated_path_is_asked_for_its_answer_and_what_it_says_is_its_answer() -> None:
    """Values 0.2, 0.8, 0.81, 0.82: behind turn 3 two quiet turns have passed. It would have searched a fourth time."""
    engine = KnowingEngine({"a": (0.2, 0.8, 0.81, 0.82, 0.83)}, searches=4)
    group = grow(engine, GainBranching(initial_rollouts=1, stop_probability=1.0), samples=1)
    (end,) = group.trajectories
    assert (end.status, end.answer) == (Status.FINISHED, "Rome")
    kinds = [group.nodes[index].kind for index in end.path]
    assert kinds == ["prompt", *["action", "observation"] * 3, "asking", "action"]
    asking, last = (group.nodes[index] for index in end.path[-2:])
    assert asking.text == ASKING and last.text == "Rome</answer>" and last.turn == 4
    assert [(point.turn, point.stop_probability, point.stopped) for point in group.value_points] == [
        (2, 0.0, False),
        (3, 0.0, False),
        (4, 1.0, True),
    ]
    assert group.value_points[-1].change == pytest.approx(0.01) and group.value_points[-1].probability is None
    score(group, build({"model": {"path": "m"}, "reward": REWARD.model_dump()}))
    assert end.reward == 1.0 and end.reward_parts["format_ok"] == 1.0, "the forced text opens the answer that the policy closes"
    assert rollout_metrics([group])["stopped"] == 1.0


def test_gains_of_a_stopped_path_are_those_of_its_states_before_it_was_asked() -> None:
    engine = KnowingEngine({"a": (0.2, 0.8, 0.81, 0.82, 0.83)}, searches=4)
    group = grow(engine, GainBranching(initial_rollouts=1, stop_probability=1.0), samples=1)
    add_probes(group, ChatFormat(WORDS, Rollout(**SETTINGS), REWARD).render_probe, REWARD)  # type: ignore[arg-type]
    probes = [node for node in group.nodes if node.kind == "probe"]
    assert [group.nodes[probe.parent or 0].kind for probe in probes] == ["prompt", *["observation"] * 3]
    turn_gains(group, REWARD)
    expected = [math.log(0.8 / 0.2), math.log(0.81 / 0.8), math.log(0.82 / 0.81)]
    assert group.trajectories[0].gains[:3] == pytest.approx(expected) and group.trajectories[0].gains[3] is None


@pytest.mark.parametrize(("asking", "said"), [(ASKING, "I do not know"), ("<think>Now.</think>\n", CALL)])
def test_who_is_asked_and_gives_no_answer_ends_as_malformed(asking: str, said: str) -> None:
    engine = KnowingEngine({"a": (0.2, 0.8, 0.81, 0.82, 0.83)}, searches=4, when_asked=said, asking=asking)
    reward = REWARD.model_copy(update={"probe_template": asking + "{answer}</answer>"})
    (end,) = grow(engine, GainBranching(initial_rollouts=1, stop_probability=1.0), samples=1, reward=reward).trajectories
    assert end.status is Status.BAD_FORMAT and end.answer is None
    assert len(end.path) == 9, "the question, three turns with results, the text that asks and what came: no tool is used any more"


def test_a_path_that_may_stop_does_so_with_the_stated_chance() -> None:
    """30 paths that are saturated behind their first turn, at 0.7 each: 21 expected, standard deviation 2.5."""
    config = GainBranching(initial_rollouts=8, stop_turns=1, stop_change=0.1, stop_probability=0.7)
    points = []
    for seed in range(4):
        values = dict.fromkeys("abcdefgh", (0.6, 0.6, 0.6))
        points += grow(KnowingEngine(values), config, samples=8, seed=seed).value_points
    assert len(points) == 32 and {point.stop_probability for point in points} == {0.7}
    assert abs(sum(point.stopped for point in points) - 32 * 0.7) < 3 * math.sqrt(32 * 0.7 * 0.3)


def test_values_of_other_weights_are_not_compared() -> None:
    """New weights came behind turn 2: the quiet turns before say nothing, and one turn since is not two."""
    engine = KnowingEngine({"a": (0.8, 0.8, 0.8, 0.8, 0.8)}, searches=3, new_weights=2)
    group = grow(engine, GainBranching(initial_rollouts=1, stop_probability=1.0), samples=1)
    assert [(point.turn, point.stopped) for point in group.value_points] == [(2, False), (3, False), (4, False)]
    same = grow(KnowingEngine(engine.values, searches=3), GainBranching(initial_rollouts=1, stop_probability=1.0), samples=1)
    assert [(point.turn, point.stopped) for point in same.value_points] == [(2, False), (3, True)]


def test_a_sibling_whose_probe_fails_fails_alone_and_holds_up_no_decision() -> None:
    engine = KnowingEngine({letter: (0.2, value) for letter, value in zip("abcdefgh", (0.1, 0.5, 0.9) * 3, strict=False)}, broken="b")
    group = grow(engine, GainBranching(initial_rollouts=3, spread_weight=2.5, stop_probability=0.0), samples=5, deadline_s=120)
    assert [end.status for end in group.trajectories] == [Status.FINISHED, Status.ENGINE_FAILED, *[Status.FINISHED] * 3]
    sound = [point for point in group.value_points if point.trajectory in (0, 2)]
    assert [(point.siblings, round(point.spread, 3)) for point in sound] == [(2, 0.4)] * 2 and all(point.children for point in sound)
    assert all(point.value is None and point.probability is None for point in group.value_points if point.trajectory == 1)


def test_decisions_are_written_read_back_and_drawn(tmp_path: Path) -> None:
    engine = KnowingEngine({"a": (0.5, 0.5, 0.5, 0.5), "b": (0.5, 0.9, 0.9, 0.9)}, searches=3)
    group = grow(engine, GainBranching(initial_rollouts=2, spread_weight=2.5, stop_probability=1.0, stop_value=0.6), samples=3)
    file = tmp_path / "rollouts" / "step_000001.parquet"
    write_rollouts(file, 1, [group])
    ((_, (read,)),) = read_rollouts(file)
    assert read.value_points == group.value_points and len(read.value_points) > 2
    picture = tree_picture(read, read.trajectories)
    assert picture is not None and [fork["samples"] for fork in picture["forks"] if fork["samples"]] == [[3]]
    assert any(fork["stopped"] for fork in picture["forks"]) and picture["forks"][0]["spread"] == pytest.approx(0.2)
    assert '"stopped": true' in write_report(tmp_path).read_text(encoding="utf-8")
