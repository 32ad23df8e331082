"""Requests and engines that die, without a real engine: who is asked, who is started again, and when the run ends."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray

from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.engines.actor import KILLED, EngineActor, EngineLost
from igpo_megatron.engines.api import EngineError, EnginesEnded
from igpo_megatron.engines.fleet import EngineDied, EngineState, Fleet
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.types import Completion, ProbeScore, SamplingRequest, SyncError

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
DEAD, HEALTHY, STALE, STARTING = EngineState.DEAD, EngineState.HEALTHY, EngineState.STALE, EngineState.STARTING


class Actor:
    """An engine that answers `script(arguments)`, or raises it."""

    def __init__(self, script: Callable[..., Any]) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.generate = self.score = SimpleNamespace(remote=self._remote)
        self._script = script

    async def _remote(self, *arguments: Any, **options: Any) -> Any:
        self.asked.append(arguments)
        found = self._script(*arguments)
        if isinstance(found, BaseException):
            raise found
        return found


def turn(version: int = 0) -> Callable[..., Any]:
    return lambda *arguments: Completion([7], [-0.5], "stop", version)


def settings(count: int, **engine: Any) -> Config:
    return build(
        {"model": {"path": str(POLICY), "dtype": "fp32"}, "run": {"device": "cpu"}, "rollout": {"engine": {"count": count, **engine}}}
    )


def pool_of(*actors: Actor, states: tuple[EngineState, ...] | None = None, **engine: Any) -> tuple[EnginePool, list[Callable[[], None]]]:
    """A pool over scripted engines, and the restarts that it wants to run."""
    config = settings(len(actors), **engine)
    pool, wanted = EnginePool(config), []
    cluster: Any = SimpleNamespace(last_log_lines=lambda process: f"\nlast lines of the engine's log:\n  of {process}", ended=lambda: None)
    fleet = Fleet(config, cluster, Path("weights"), cuda=False, turns=pool._turns, fill=lambda member: None)
    for number, (member, actor) in enumerate(zip(fleet.members, actors, strict=True)):
        member.actor, member.process, member.state = actor, 100 + number, (states or (HEALTHY,) * len(actors))[number]
    fleet._run = lambda work, name: wanted.append(work)  # type: ignore[method-assign]
    fleet._end = lambda actor: None  # type: ignore[method-assign]
    pool._fleet = fleet
    return pool, wanted


def ask(pool: EnginePool, key: str = "q", seed: int = 3) -> Any:
    return pool.generate(SamplingRequest([1, 2], max_tokens=5, temperature=1.0, seed=seed, key=key))


def test_an_engine_is_started_with_what_ends_every_turn_and_asked_with_the_whole_request(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, started = Actor(turn()), []
    pool, _ = pool_of(actor)
    member = pool._fleet.members[0]
    actor.place = SimpleNamespace(remote=lambda: None)  # type: ignore[attr-defined]
    actor.start = SimpleNamespace(remote=lambda *arguments: started.append(arguments))  # type: ignore[attr-defined]
    monkeypatch.setattr(pool._fleet, "wait_for", lambda *_: (7, "node"))
    monkeypatch.setattr(pool._fleet, "_is_here", lambda *_: True)
    pool._fleet._load(member)
    ((options, weights, turns),) = started
    assert (weights, turns["stop_token_ids"], turns["stop"], options["skip_tokenizer_init"]) == ("weights", [2], [], True)
    request = SamplingRequest([1, 2], 5, 0.5, 3, "q", top_logprobs=-1, experts_from=1)
    asyncio.run(pool.generate(request))
    assert actor.asked == [(request,)]


def test_an_answered_request_leaves_nothing_that_waits_for_a_change() -> None:
    """An evaluation makes thousands of requests between two changes."""
    pool, _ = pool_of(Actor(turn()))
    cancelled, _ = pool_of(Actor(turn()), states=(STARTING,))

    async def many() -> None:
        for number in range(5):
            await ask(pool, str(number))
        waits = asyncio.ensure_future(ask(cancelled))
        await asyncio.sleep(0)
        assert len(cancelled._fleet.changes._waiting) == 1
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        await asyncio.sleep(0)

    asyncio.run(many())
    assert not pool._fleet.changes._waiting and not cancelled._fleet.changes._waiting


def test_equal_keys_go_to_the_same_engine_and_others_are_spread() -> None:
    actors = [Actor(turn()), Actor(turn())]
    pool, _ = pool_of(*actors)
    for key in "abcdefgh":
        for _ in range(2):
            asyncio.run(ask(pool, key))
    assert sum(len(actor.asked) for actor in actors) == 16 and all(actor.asked and len(actor.asked) % 2 == 0 for actor in actors)


def test_a_turn_whose_engine_dies_is_generated_again_elsewhere_with_the_same_seed(caplog: pytest.LogCaptureFixture) -> None:
    dying = [Actor(lambda *arguments: EngineLost("EngineCore died")) for _ in range(2)]
    for place in (0, 1):
        actors = [Actor(turn()), Actor(turn())]
        actors[place] = dying[place]
        pool, wanted = pool_of(*actors)
        with caplog.at_level(logging.WARNING):
            found = [asyncio.run(ask(pool, key, seed=40)) for key in "abcd"]
        assert all(done.token_ids == [7] for done in found)
        assert len(dying[place].asked) == 1 and len(actors[1 - place].asked) == 4
        assert dying[place].asked[0] in actors[1 - place].asked and dying[place].asked[0][0].seed == 40
        assert pool._fleet.members[place].state is DEAD and len(wanted) == 1 and pool.metrics() == {"engine_restarts": 1.0}
        assert f"engine {place} died (EngineCore died); restart 1 of at most 3" in caplog.text and f"of {100 + place}" in caplog.text


def test_an_engine_that_ray_ended_for_want_of_memory_is_restarted_and_named_as_that(caplog: pytest.LogCaptureFixture) -> None:
    said = "1 worker(s) were killed due to the node running low on memory.\nRefer to the documentation on how to address this"
    pool, wanted = pool_of(Actor(lambda *arguments: ray.exceptions.OutOfMemoryError(said)), Actor(turn()))
    with caplog.at_level(logging.WARNING):
        found = [asyncio.run(ask(pool, key)) for key in "abcd"]
    assert all(done.token_ids == [7] for done in found) and len(wanted) == 1
    assert "engine 0 died (1 worker(s) were killed due to the node running low on memory.); restart 1 of at most 3" in caplog.text


def test_a_request_waits_for_the_only_engine_to_come_back() -> None:
    answers = iter([EngineLost("gone"), Completion([9], [-0.1], "stop", 0)])
    pool, wanted = pool_of(Actor(lambda *arguments: next(answers)))

    async def wait() -> Any:
        asked = asyncio.ensure_future(ask(pool))
        while not wanted:
            await asyncio.sleep(0)
        assert not asked.done()
        await asyncio.to_thread(pool._fleet.set_state, pool._fleet.members[0], STALE)
        await asyncio.sleep(0.01)
        assert not asked.done(), "a stale engine serves nobody"
        await asyncio.to_thread(pool._fleet.set_state, pool._fleet.members[0], HEALTHY)
        return await asked

    assert asyncio.run(wait()).token_ids == [9]


@pytest.mark.parametrize("state", [STALE, STARTING, DEAD])
def test_only_a_healthy_engine_is_asked_and_the_wait_for_one_ends(state: EngineState) -> None:
    actor = Actor(turn())
    pool, _ = pool_of(actor, states=(state,), request_timeout_s=0.05)
    with pytest.raises(EngineError, match=f"a turn found no engine within rollout.engine.request_timeout_s=0.05: engine 0 is {state}"):
        asyncio.run(ask(pool))
    assert actor.asked == []


def test_a_turn_that_takes_too_long_is_named() -> None:
    actor = Actor(turn())
    actor.generate = SimpleNamespace(remote=lambda *arguments: asyncio.sleep(30))
    pool, _ = pool_of(actor, request_timeout_s=0.05)
    with pytest.raises(EngineError, match=r"engine 0 did not answer a turn within rollout.engine.request_timeout_s=0.05"):
        asyncio.run(ask(pool))


def test_weights_that_were_never_sent_are_refused() -> None:
    pool, _ = pool_of(Actor(turn(version=5)))
    with pytest.raises(EngineError, match="engine 0 answered with weights 5, which it was never given"):
        asyncio.run(ask(pool))
    pool._versions.add(5)
    assert asyncio.run(ask(pool)).weight_version == 5


def test_an_engine_without_restarts_left_stops_the_run_and_is_named_with_its_log() -> None:
    pool, wanted = pool_of(Actor(lambda *arguments: EngineLost("out of memory")), Actor(turn()), max_restarts=1)
    fleet, member = pool._fleet, pool._fleet.members[0]
    fleet.lost(member, member.actor, EngineLost("out of memory"))
    fleet.lost(member, member.actor, EngineLost("said twice"))  # by another request
    assert member.restarts == 1 and len(wanted) == 1 and fleet.problem is None
    member.state = HEALTHY
    fleet.lost(member, member.actor, EngineLost("out of memory"))
    with pytest.raises(
        EnginesEnded, match=r"engine 0 died \(out of memory\), and rollout.engine.max_restarts=1 restart of it .*used\n.*log:\n.*of 100"
    ):
        asyncio.run(ask(pool, "b"))
    with pytest.raises(EnginesEnded, match="engine 0 died"):
        pool._weights = object()  # type: ignore[assignment]
        pool.update_weights([], 1)


def test_a_death_that_is_heard_of_late_is_not_counted_again_while_the_next_actor_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, wanted = pool_of(old := Actor(turn()), max_restarts=1)
    fleet = pool._fleet
    (member,) = fleet.members
    fleet.lost(member, old, EngineLost("killed"))

    class Late:
        def options(self, **options: Any) -> Late:
            return self

        def remote(self, number: int) -> Actor:
            fleet.lost(member, old, EngineLost("the old one is gone"))  # by a request that was still under way
            return Actor(turn())

    monkeypatch.setattr(ray, "remote", lambda kind: Late())
    new = fleet._place(member)
    fleet.lost(member, old, EngineLost("the old one is gone"))
    assert (member.actor, member.state, member.restarts, fleet.problem) == (new, STARTING, 1, None) and len(wanted) == 1
    fleet.lost(member, new, EngineLost("killed, too"))
    assert isinstance(fleet.problem, EnginesEnded)


def test_probes_are_asked_again_like_turns() -> None:
    answers = iter([EngineLost("gone"), (ProbeScore((-0.25,), 0), 0)])
    actor = Actor(lambda *arguments: next(answers))
    pool, _ = pool_of(actor, actor)
    assert asyncio.run(pool.score_probe([1, 2, 3], 2, key="q")).logprobs == (-0.25,)
    assert len(actor.asked) == 2


def test_scores_that_are_no_log_probs_are_refused() -> None:
    pool, _ = pool_of(Actor(lambda *arguments: (ProbeScore((-0.25, 0.5), 0), 0)))
    with pytest.raises(EngineError, match=r"engine 0 scored a probe with \(-0.25, 0.5\), which are no log-probs"):
        asyncio.run(pool.score_probe([1, 2, 3], 1, key="q"))


@pytest.mark.parametrize("first", [True, False])
def test_an_engine_that_dies_while_it_starts_is_started_again(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    fleet, wanted = starting(monkeypatch, EngineDied("engine 0 did not start: SIGKILL"))
    fleet._start(fleet.members[0], first=first)
    assert fleet.problem is None and len(wanted) == 1 and fleet.members[0].state is DEAD and fleet.members[0].restarts == 1


def test_what_an_engine_refuses_ends_a_run_that_begins_and_is_tried_again_in_one_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = EngineError("engine 0 did not start: no such model")
    fleet, wanted = starting(monkeypatch, refusal)
    fleet._start(fleet.members[0], first=True)
    assert isinstance(fleet.problem, EnginesEnded) and str(fleet.problem) == str(refusal) and not wanted
    fleet.lost(fleet.members[0], fleet.members[0].actor, EngineLost("gone"))
    assert str(fleet.problem) == str(refusal) and not wanted, "a run that ends starts nothing again, and keeps its reason"
    fleet, wanted = starting(monkeypatch, refusal)
    fleet._start(fleet.members[0])
    assert fleet.problem is None and len(wanted) == 1


def starting(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> tuple[Fleet, list[Callable[[], None]]]:
    """A fleet of one engine, which starts with a problem, and the restarts that it wants to run."""
    pool, wanted = pool_of(Actor(turn()), states=(STARTING,))
    fleet = pool._fleet
    assert fleet is not None

    def wait_for(*arguments: Any) -> Any:
        raise problem

    for name, stand_in in {"_place": lambda member: member.actor, "_load": lambda member: None, "wait_for": wait_for}.items():
        monkeypatch.setattr(fleet, name, stand_in)
    return fleet, wanted


def test_a_health_check_outlives_what_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread must not end with a traceback when a sync has failed; nobody is started again for that."""
    pool, wanted = pool_of(Actor(turn()), health_interval_s=0.01)
    fleet, looks = pool._fleet, 0
    assert fleet is not None
    fleet.members[0].actor.check_health = SimpleNamespace(remote=lambda: None)

    def wait_for(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 3:
            fleet._closing.set()
        raise SyncError("engine 0 has other weights")

    monkeypatch.setattr(fleet, "wait_for", wait_for)
    fleet._watch()
    assert looks == 3 and not wanted


@pytest.mark.parametrize(
    ("codes", "killed"), [("{'EngineCore': -9}", True), ("{'EngineCore': 1}", False), ("{'A': 1, 'EngineCore': -15}", True), ("{}", True)]
)
def test_a_signal_that_ends_a_starting_engine_is_told_from_its_own_end(codes: str, killed: bool) -> None:
    said = f"Engine core initialization failed. See root cause above. Failed core proc(s): {codes}"
    assert bool(KILLED.search(said)) is killed


def test_an_engine_that_is_killed_right_after_its_start_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is started again: one that refuses to start the first time ends the run."""
    dead = type("EngineDeadError", (Exception,), {})
    vllm = mock.MagicMock(EngineDeadError=dead)
    vllm.AsyncLLM.from_engine_args.return_value.init_weight_transfer_engine.side_effect = dead("EngineCore died")
    for name in ("config", "distributed.weight_transfer.base", "engine.arg_utils", "v1.engine.async_llm", "v1.engine.exceptions"):
        parts = ["vllm", *name.split(".")]
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), vllm)
    actor = EngineActor(0)
    with pytest.raises(EngineLost, match="EngineCore died"):
        asyncio.run(actor.start({}, "weights", {}))
    asyncio.run(actor.stop())
