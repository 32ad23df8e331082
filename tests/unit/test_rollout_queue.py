"""Which questions are under way when, what a checkpoint knows of them, and how old the tokens of a step may be."""

import asyncio
import json
import math
import threading
import time
from collections import Counter
from concurrent.futures import Future

import pytest

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.algorithms.advantages.outcome import GREEDY_REWARD
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.load import build
from igpo_megatron.engines.api import EngineError
from igpo_megatron.observability.metrics import logprob_gap, rollout_metrics
from igpo_megatron.training.queue import RolloutQueue, check_staleness, staleness_metrics
from igpo_megatron.training.services import queue_state
from igpo_megatron.types import Completion, Node, Prompt, RolloutGroup, RunStopped, SamplingRequest, Status, ToolCall, Trajectory
from tests.unit.test_rollouts import SETTINGS, WORDS, ScriptedSearch, searching
from tests.unit.test_rollouts import completion as said

ANSWER = "<think>I know.</think>\n<answer>{}</answer>"


def group_of(prompt: Prompt, answers: list[str], status: Status = Status.FINISHED, version: int = 0) -> RolloutGroup:
    group = RolloutGroup(prompt, [Node(None, "prompt", [1])])
    for answer in answers:
        number = group.add(Node(0, "action", [2, 3], 1, text=ANSWER.format(answer), weight_version=version))
        group.trajectories.append(Trajectory([0, number], status))
    return group


class Questions:
    """An endless order of questions q0, q1, ... and what became of them."""

    def __init__(self) -> None:
        self.drawn = 0
        self.finished: set[int] = set()

    def draw(self, n: int) -> list[int]:
        self.drawn += n
        return list(range(self.drawn - n, self.drawn))

    def question(self, ordinal: int) -> Prompt:
        return Prompt(f"q{ordinal}", "Where?", ("Rome",), "test")

    def done(self, ordinals: list[int]) -> None:
        self.finished.update(ordinals)

    def state(self) -> list[int]:
        return [ordinal for ordinal in range(self.drawn) if ordinal not in self.finished]


class AtOnce:
    """Rollouts that are over when they begin. Question n has one right and one wrong sample where hits[n], else two wrong ones."""

    def __init__(self, hits: list[bool], greedy: list[Status] | None = None, version: int = 0) -> None:
        self.hits, self.greedy, self.version = hits, greedy or [], version
        self.asked: list[str] = []
        self.before: list[list[int]] = []

    def tallies(self) -> dict[str, object]:
        return {}

    def start(self, work: object) -> Future[list[RolloutGroup]]:
        future: Future[list[RolloutGroup]] = Future()
        try:
            future.set_result(asyncio.run(work))  # type: ignore[arg-type]
        except RunStopped as error:
            future.set_exception(error)
        return future

    async def run(self, prompts: list[Prompt], *, temperature: float | None, asked: Counter[str], **_: object) -> list[RolloutGroup]:
        self.asked += [prompt.id for prompt in prompts]
        self.before.append([asked[prompt.id] for prompt in prompts])
        asked.update(prompt.id for prompt in prompts)
        if temperature == 0.0:
            return [group_of(prompt, ["Rome"], status, self.version) for prompt, status in zip(prompts, self.greedy, strict=True)]
        return [group_of(prompt, ["Rome" if self.hits[int(prompt.id[1:])] else "Oslo", "Oslo"], version=self.version) for prompt in prompts]


def queue_of(rollouts: object, *overrides: str, questions: Questions | None = None, first_step: int = 1) -> RolloutQueue:
    config = build({"model": {"path": "m"}}, ["advantage.name=grpo", "rollout.prompts_per_step=2", "run.steps=9", *overrides])
    return RolloutQueue(config, questions or Questions(), rollouts, first_step=first_step)  # type: ignore[arg-type]


def ids(groups: list[RolloutGroup]) -> list[str]:
    return [group.prompt.id for group in groups]


# ---- what a batch is made of


def test_the_tool_bonus_is_for_search_whatever_the_policy_calls_it() -> None:
    class BothTools(AtOnce):
        search = "search"

        async def run(self, prompts: list[Prompt], **_: object) -> list[RolloutGroup]:
            groups = []
            for prompt in prompts:
                group = RolloutGroup(prompt, [Node(None, "prompt", [1])])
                for name in (self.search, "python"):
                    last = len(group.nodes) - 1
                    group.add(Node(last, "action", [2], 1, "<think>x</think>", weight_version=0, call=ToolCall(name, ("y",))))
                    group.add(Node(last + 1, "observation", [3], 1))
                group.add(Node(len(group.nodes) - 1, "action", [2], 3, ANSWER.format("Rome"), weight_version=0))
                group.trajectories = [Trajectory(list(range(len(group.nodes))), Status.FINISHED)]
                groups.append(group)
            return groups

    settings = ["reward.tool_bonus=0.1", "rollout.tool_name=look_up", "rollout.extra_tools=[python]", "rollout.protocol=search_r1"]
    for called, reward in (("search", 1.1), ("look_up", 1.0)):
        rollouts = BothTools([True])
        rollouts.search = called
        groups = queue_of(rollouts, *settings).take(1)
        assert [end.reward for group in groups for end in group.trajectories] == [reward] * 2


def test_without_resampling_every_group_is_kept() -> None:
    rollouts = AtOnce([False, True, True])
    assert ids(queue_of(rollouts).take(1)) == ["q0", "q1"] == rollouts.asked


def test_a_question_that_leaves_no_room_for_a_turn_is_replaced_by_the_next_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    questions, rollouts = Questions(), AtOnce([True] * 9)
    config = build({"model": {"path": "m"}}, ["advantage.name=grpo", "rollout.prompts_per_step=2", "run.steps=9"])
    too_long = {"q0", "q2", "q3"}
    queue = RolloutQueue(
        config,
        questions,  # type: ignore[arg-type]
        rollouts,  # type: ignore[arg-type]
        first_step=1,
        too_long=lambda prompt: "takes 130 tokens" if prompt.id in too_long else None,
    )
    assert ids(queue.take(1)) == ["q1", "q4"] == rollouts.asked
    assert queue.state() == [1, 4], "what does not fit is not asked again"
    assert queue.done(1)["questions_too_long"] == 3.0
    rollouts.version = 1
    assert ids(queue.take(2)) == ["q5", "q6"] and queue.done(2)["questions_too_long"] == 0.0
    (warning,) = caplog.records
    assert "question q0: takes 130 tokens" in warning.getMessage()


def test_a_file_in_which_no_question_leaves_room_for_a_turn_stops_the_run_with_one_sentence() -> None:
    config = build({"model": {"path": "m"}}, ["rollout.prompts_per_step=2", "rollout.max_context=128"])
    queue = RolloutQueue(config, Questions(), AtOnce([]), first_step=1, too_long=lambda prompt: "is long")  # type: ignore[arg-type]
    with pytest.raises(RunStopped, match=r"of 200 questions drawn for step 1, 200 leave no room for a turn in rollout.max_context=128"):
        queue.take(1)


class OneQuestion(Questions):
    """The same question, under the ordinals 0, 1, ..."""

    def question(self, ordinal: int) -> Prompt:
        return Prompt("q" + str(ordinal % 2), "Where?", ("Rome",), "test")


def test_successes_are_replayed_into_later_groups_that_failed() -> None:
    """Steps 1 and 2 ask q0 and q1; the second time both fail. Only q0 has succeeded before; an older token is no error."""
    settings = ("rollout.replay_successes=4", "rollout.prompts_per_step=2")
    rollouts = AtOnce([True, False], version=0)
    queue = queue_of(rollouts, *settings, questions=OneQuestion())
    assert [sum(end.reward for end in group.trajectories) for group in queue.take(1)] == [1.0, 0.0]
    rollouts.hits, rollouts.version = [False, False], 1
    groups = queue.take(2)
    assert [sum(end.reward for end in group.trajectories) for group in groups] == [1.0, 0.0]
    assert rollout_metrics(groups)["replayed"] == 1.0 and staleness_metrics(groups, 2)["staleness_max"] == 0.0

    resumed = queue_of(rollouts, *settings, questions=OneQuestion(), first_step=2)
    resumed.successes.load_state(json.loads(json.dumps(queue_state(queue)))["successes"])
    assert [[end.reward for end in group.trajectories] for group in resumed.take(2)] == [
        [end.reward for end in group.trajectories] for group in groups
    ]


def test_groups_of_equal_rewards_are_replaced_as_long_as_batches_are_left() -> None:
    questions, rollouts = Questions(), AtOnce([False, True, False, True, True, True])
    queue = queue_of(rollouts, "rollout.resample=2", questions=questions)
    assert ids(queue.take(1)) == ["q1", "q3"] and rollouts.asked == ["q0", "q1", "q2", "q3"]
    assert queue.state() == [0, 1, 2, 3]
    queue.done(1)
    assert queue.state() == [], "what was replaced is done with, too"
    assert ids(queue_of(AtOnce([False, False, False, True]), "rollout.resample=1").take(1)) == ["q3", "q0"]


def test_a_batch_knows_how_often_it_has_asked_a_question_whatever_other_batches_do() -> None:
    """One step asks q0 and q1, and both again in place of groups of equal rewards; the next step begins anew."""
    rollouts = AtOnce([False, False])
    queue = queue_of(rollouts, "rollout.resample=1", "rollout.max_staleness=1", questions=OneQuestion())
    queue.weights_arrived(0)
    assert rollouts.before == [[0, 0], [1, 1]] * 2


def test_remax_samples_one_greedy_trajectory_per_question() -> None:
    first, second = queue_of(AtOnce([True, True], greedy=[Status.FINISHED, Status.TOOL_FAILED]), "advantage.name=remax").take(1)
    assert first.metrics[GREEDY_REWARD] == 1.0
    assert math.isnan(second.metrics[GREEDY_REWARD])


# ---- when batches begin


def test_in_turn_a_batch_begins_when_it_is_asked_for() -> None:
    rollouts = AtOnce([True] * 18)
    queue = queue_of(rollouts)
    queue.weights_arrived(0)
    assert rollouts.asked == []
    queue.take(1)
    queue.done(1)
    queue.weights_arrived(1)
    assert rollouts.asked == ["q0", "q1"]


def test_weights_open_the_batches_that_may_begin_with_them_and_no_others() -> None:
    rollouts = AtOnce([True] * 18)
    queue = queue_of(rollouts, "rollout.max_staleness=2")
    queue.weights_arrived(0)
    assert rollouts.asked == [f"q{number}" for number in range(6)], "steps 1, 2 and 3 may be sampled by version 0"
    assert ids(queue.take(1)) == ["q0", "q1"] and len(rollouts.asked) == 6
    queue.weights_arrived(1)
    assert rollouts.asked[6:] == ["q6", "q7"]


def test_nothing_begins_beyond_the_last_step() -> None:
    rollouts = AtOnce([True] * 18)
    queue_of(rollouts, "rollout.max_staleness=3", "run.steps=2").weights_arrived(0)
    assert rollouts.asked == ["q0", "q1", "q2", "q3"]


def test_a_checkpoint_keeps_what_is_under_way_and_a_resumed_queue_goes_on_with_its_step() -> None:
    questions, rollouts = Questions(), AtOnce([True] * 18, version=4)
    queue = queue_of(rollouts, "rollout.max_staleness=1", questions=questions, first_step=5)
    queue.weights_arrived(4)
    queue.take(5)
    assert queue.state() == [0, 1, 2, 3]
    queue.done(5)
    assert queue.state() == [2, 3], "begun for step 6"
    assert ids(queue.take(6)) == ["q2", "q3"]


# ---- how old a token may be


def test_staleness_counts_every_trained_token_once() -> None:
    old, new = group_of(Prompt("q", "?", ("a",), "t"), ["Rome"], version=2), group_of(Prompt("p", "?", ("a",), "t"), ["Rome"], version=4)
    new.nodes[1].token_ids = [5] * 6
    new.trajectories *= 2  # a turn that two trajectories share
    failed = group_of(Prompt("r", "?", ("a",), "t"), ["Rome"], Status.ENGINE_FAILED, version=0)
    assert staleness_metrics([old, new, failed], step=5) == {"staleness_mean": (2 * 2 + 0 * 6) / 8, "staleness_max": 2.0}
    assert staleness_metrics([failed], step=5) == {}
    check_staleness([old, new, failed], 5, 2)


def test_turns_of_older_weights_say_nothing_of_the_gap_between_engine_and_trainer() -> None:
    fresh, stale = (group_of(Prompt("q", "?", ("a",), "t"), ["Rome"], version=version) for version in (4, 3))
    for group, difference in ((fresh, 0.001), (stale, math.log(2))):
        group.nodes[1].behavior_logprobs, group.nodes[1].old_logprobs = [-1.0, -1.0], [-1.0, -1.0 + difference]
    found = logprob_gap([fresh, stale], 4)
    assert found == pytest.approx(
        {
            "logprob_gap_mean": 0.0005,
            "logprob_gap_max": 0.001,
            "stale_gap_mean": math.log(2) / 2,
            "importance_ess": (1 + 2) ** 2 / (2 * (1 + 4)),
        }
    )
    assert logprob_gap([fresh, stale])["logprob_gap_max"] == pytest.approx(math.log(2)), "without a version all are compared"
    assert logprob_gap([]) == {}


@pytest.mark.parametrize(("version", "allowed"), [(2, 1), (3, 0), (5, 2)])
def test_a_token_of_weights_too_old_or_not_there_yet_stops_the_run(version: int, allowed: int) -> None:
    group = group_of(Prompt("q", "?", ("a",), "t"), ["Rome"], version=version)
    with pytest.raises(RunStopped, match=rf"weights of version {version}, expected versions {4 - allowed} to 4 \(rollout.max_staleness"):
        check_staleness([group], 5, allowed)
    rollouts = AtOnce([True] * 18, version=version)
    with pytest.raises(RunStopped, match=f"step 5 was given a turn sampled by the weights of version {version}"):
        queue_of(rollouts, f"rollout.max_staleness={allowed}", first_step=5).take(5)


# ---- with a real rollouter


class Held:
    """An engine that answers right away, but not a prompt that names something held back before it is let go."""

    def __init__(self, held: str) -> None:
        self.held, self.version = held, 0
        self.go = threading.Event()
        self.asked: list[str] = []

    async def generate(self, request: SamplingRequest) -> Completion:
        text = WORDS.decode(request.token_ids)
        self.asked.append(text)
        while self.held in text and not self.go.is_set():
            await asyncio.sleep(0.002)
        return Completion(*_fields(self.version))


def _fields(version: int) -> tuple[list[int], list[float], str, int]:
    spoken = said("<think>x</think><answer>Rome</answer>")
    return spoken.token_ids, spoken.logprobs, "stop", version


class Named(Questions):
    def question(self, ordinal: int) -> Prompt:
        return Prompt(f"q{ordinal}", ("Italy", "Rome", "capital", "Paris")[ordinal % 4], ("Rome",), "test")


def test_a_batch_ahead_goes_on_while_another_is_trained_and_its_failure_waits_for_its_step() -> None:
    class Failing(Held):
        async def generate(self, request: SamplingRequest) -> Completion:
            if "capital" in WORDS.decode(request.token_ids):
                raise EngineError("engine 0 died")
            return await super().generate(request)

    engine = Failing("nothing")
    config = Rollout(**SETTINGS)  # type: ignore[arg-type]
    with Rollouter(engine, searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=0) as rollouter:  # type: ignore[arg-type]
        settings = ["rollout.max_staleness=1", "rollout.samples_per_prompt=1", "run.steps=2"]
        queue = queue_of(rollouter, *settings, questions=Named())
        queue.weights_arrived(0)
        assert [end.status for group in queue.take(1) for end in group.trajectories] == [Status.FINISHED] * 2
        queue.done(1)
        engine.version = 1
        with pytest.raises(RunStopped, match="engine 0 died"):
            queue.take(2)


def test_leaving_the_rollouter_ends_what_is_under_way() -> None:
    engine = Held("capital")
    config = Rollout(**SETTINGS)  # type: ignore[arg-type]
    with Rollouter(engine, searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=0) as rollouter:  # type: ignore[arg-type]
        queue = queue_of(rollouter, "rollout.max_staleness=1", "rollout.samples_per_prompt=1", questions=Named())
        queue.weights_arrived(0)
        queue.take(1)
        deadline = time.monotonic() + 30
        while not any("capital" in text for text in engine.asked):
            assert time.monotonic() < deadline, "step 2 never began"
            time.sleep(0.002)
    # Leaving did not wait for what the engine holds back.


def test_a_group_closes_when_enough_have_ended_and_gives_up_the_others() -> None:
    class Straggler(Held):
        async def generate(self, request: SamplingRequest) -> Completion:
            self.asked.append(str(request.seed))
            if len(self.asked) in (2, 4):
                await asyncio.sleep(3600)
            return Completion(*_fields(0))

    engine = Straggler("")
    config = Rollout(**SETTINGS)  # type: ignore[arg-type]
    with Rollouter(engine, searching(ScriptedSearch()), ChatFormat(WORDS, config, Reward()), config, seed=0) as rollouter:  # type: ignore[arg-type]
        work = rollouter.run([Prompt("q", "Italy", ("Rome",), "t")], samples=5, salt=1, temperature=None, close_at=3)
        (group,) = rollouter.start(work).result(timeout=60)
    ends = [end.status for end in group.trajectories]
    assert ends == [Status.FINISHED, Status.LATE, Status.FINISHED, Status.LATE, Status.FINISHED]
    metrics = rollout_metrics([group])
    assert metrics["late"] == 0.4 and metrics["failed"] == 0.0


class Seeded:
    """An engine that says more or less by its seed, slower or faster by its seed."""

    async def generate(self, request: SamplingRequest) -> Completion:
        await asyncio.sleep(request.seed % 7 / 1000)
        spoken = said("<think>" + "x " * (request.seed % 5) + "</think><answer>Rome</answer>")
        return Completion(spoken.token_ids, [-0.25] * len(spoken.token_ids), "stop", 0)


def texts(groups: list[RolloutGroup]) -> list[list[str]]:
    """Every trajectory of every group, in order."""
    return [[group.nodes[index].text for index in end.path] for group in groups for end in group.trajectories]


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_queue_gives_what_rolling_out_step_by_step_gives(ahead: int) -> None:
    config = Rollout(**SETTINGS)  # type: ignore[arg-type]
    search, chat = ScriptedSearch(), ChatFormat(WORDS, config, Reward())
    with Rollouter(Seeded(), searching(search), chat, config, seed=3) as rollouter:  # type: ignore[arg-type]
        queue = queue_of(
            rollouter, f"rollout.max_staleness={ahead}", "rollout.samples_per_prompt=4", "run.steps=4", "run.stop_after=rollout"
        )
        for step in range(1, 5):
            queue.weights_arrived(step - 1)
            groups = queue.take(step)
            prompts = [Questions().question(ordinal) for ordinal in (2 * step - 2, 2 * step - 1)]
            alone = rollouter.start(rollouter.run(prompts, samples=4, salt=step, temperature=None)).result()
            assert texts(groups) == texts(alone)
            assert len({text for path in texts(groups) for text in path}) > 2, "samples differ"
            queue.done(step)
