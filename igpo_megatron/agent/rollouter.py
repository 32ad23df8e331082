"""Many trajectories at once: one asyncio task each, no barrier between turns.

prompts ──> groups ──gather(run_trajectory, ...)──> groups with trajectories in order of their sample number
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from igpo_megatron.agent.prober import Prober, RenderedProbe
from igpo_megatron.agent.settings import GainBranching, NoBranching, Rollout
from igpo_megatron.agent.trajectory import UNWATCHED, Agent, PathPlan, TurnWatch, counter_seed, run_trajectory
from igpo_megatron.agent.trees.entropy import EntropyTree
from igpo_megatron.agent.trees.gain import GainTree
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.room import too_long
from igpo_megatron.engines.api import Engine, EngineError
from igpo_megatron.supervision.failures import CrashLog
from igpo_megatron.tools.base import Tool
from igpo_megatron.tools.tally import Tally, TallyTool, new_tallies
from igpo_megatron.types import SEARCH, Node, Prompt, RolloutGroup, RunStopped, Status, Trajectory
from igpo_megatron.untrusted import clean_text

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class RolloutFailure(RunStopped):
    """In one step, too many trajectories or searches failed for reasons outside the policy."""


class Rollouter:
    """Runs rollouts on an event loop of its own, so that callers need not be asynchronous."""

    def __init__(
        self,
        engine: Engine,
        tools: Mapping[str, Tool],
        chat: ChatFormat,
        config: Rollout,
        *,
        seed: int,
        probes_of: Callable[[Prompt], Sequence[RenderedProbe]] | None = None,
        crashes: Path | None = None,
    ) -> None:
        """`tools`: by our names, search included; closed with the rollouter.

        `probes_of`: the probes of a question, if the engine scores them during training rollouts.

        `crashes`: file for the tracebacks of unexpected errors in trajectories.
        """
        self._agent = Agent(engine, tools, chat, config)
        self._config, self._seed, self._probes_of = config, seed, probes_of
        self._crashes = CrashLog(crashes)
        self._warned_too_long = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.start(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run `work`, such as a `run`, in the background. Cancelling the future ends it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def tallies(self) -> dict[str, Tally]:
        """A new tally per tool, for `run` to fill."""
        return new_tallies(self._agent.tools)

    async def run(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        salt: int | str,
        temperature: float | None,
        probe: bool = False,
        branch: bool = False,
        close_at: int | None = None,
        tallies: Mapping[str, Tally] | None = None,
        asked: Counter[str] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> list[RolloutGroup]:
        """One group of `samples` trajectories per prompt that fits the context; `temperature` None uses the configured one.

        `salt`: the training step or the kind of evaluation; other salts give other samples. With `probe` the engine scores the probes of
        every state, if this rollouter has any. With `branch` groups grow as `rollout.branching` says. A group closes when `close_at` of
        its trajectories have ended. Tool calls are counted in `tallies`.

        A question that is repeated in a step gets another group with other seeds. `asked` counts how often each was asked earlier in the
        step, and is updated; None if this is the step's only call.

        Raises RolloutFailure if more than `rollout.max_failed_fraction` of the trajectories or of the searches failed.
        """
        groups = [self._open(prompt) for prompt in prompts if self._has_room(prompt)]
        seeds = self._seeds(groups, Counter() if asked is None else asked)
        engine = self._agent.engine
        probers = [Prober(engine, group, self._probes_of(group.prompt)) if probe and self._probes_of else None for group in groups]
        tallies = self.tallies() if tallies is None else tallies
        agent = replace(self._agent, tools={name: TallyTool(tool, tallies[name]) for name, tool in self._agent.tools.items()})
        chosen = self._config.temperature if temperature is None else temperature
        done = 0

        async def one(
            group: RolloutGroup, prober: Prober | None, seed: int, start: Sequence[int], sample: int | str, watch: TurnWatch = UNWATCHED
        ) -> Trajectory:
            nonlocal done
            trajectory = await self._bounded(group, agent, PathPlan(sample, seed, salt, chosen, start, prober, watch))
            done += 1
            if on_progress:
                on_progress(done / (len(groups) * samples))
            return trajectory

        def whole(group: RolloutGroup, prober: Prober | None, seed: int) -> Coroutine[Any, Any, list[Trajectory]]:
            branching = self._config.branching
            if not branch or isinstance(branching, NoBranching):
                return _first([one(group, prober, seed, [0], sample) for sample in range(samples)], close_at or samples)

            def uniform(*parts: object) -> float:
                return counter_seed(seed, salt, group.prompt.id, "branch", *parts) / 2**31

            run_path = partial(one, group, prober, seed)
            if isinstance(branching, GainBranching):
                assert prober is not None, "rollout.branching.name=gain needs probes that the engine scores"
                return GainTree(group, branching, samples, run_path=run_path, uniform=uniform, prober=prober).grow()
            vocab = agent.chat.vocab_size
            return EntropyTree(group, branching, samples, run_path=run_path, uniform=uniform, vocab_size=vocab).grow()

        try:
            parts = zip(groups, probers, seeds, strict=True)
            ends = await _all([self._alone(whole(group, prober, own), group, samples) for group, prober, own in parts])
        finally:
            await asyncio.gather(*(prober.close() for prober in probers if prober is not None))
        for group, trajectories in zip(groups, ends, strict=True):
            group.trajectories = trajectories
        _check_failures([end for trajectories in ends for end in trajectories], tallies[SEARCH], self._config.max_failed_fraction)
        return groups

    async def _close(self) -> None:
        unfinished = asyncio.all_tasks() - {asyncio.current_task()}
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        await asyncio.gather(*(tool.close() for tool in self._agent.tools.values()))

    def _seeds(self, groups: Sequence[RolloutGroup], asked: Counter[str]) -> list[int]:
        """The base seed of each group: the run's seed if its question is asked for the first time in a step, else one derived from it."""
        seeds = []
        for group in groups:
            times = asked[group.prompt.id]
            seeds.append(counter_seed(self._seed, "asked again", times) if times else self._seed)
            asked[group.prompt.id] += 1
        return seeds

    def _has_room(self, prompt: Prompt) -> bool:
        """True if a question leaves room for a turn; the first that does not is logged."""
        reason = too_long(prompt, self._agent.chat, self._config)
        if reason is not None and not self._warned_too_long:
            self._warned_too_long = True
            logger.warning("question %s: %s. It is skipped; further such questions are skipped without a message", prompt.id, reason)
        return reason is None

    def _open(self, prompt: Prompt) -> RolloutGroup:
        ids, text = self._agent.chat.open(prompt.question)
        return RolloutGroup(prompt, [Node(None, "prompt", ids, text=text)])

    async def _bounded(self, group: RolloutGroup, agent: Agent, plan: PathPlan) -> Trajectory:
        """A trajectory within its deadline. Engine failures and unexpected errors end this one and no other."""
        try:
            async with asyncio.timeout(self._config.deadline_s) as deadline:
                trajectory = await run_trajectory(group, agent, plan)
                if plan.prober is not None:
                    await plan.prober.collect(trajectory.path)
                return trajectory
        except EngineError as error:
            return Trajectory([0], Status.ENGINE_FAILED, reason=clean_text(str(error)))
        except RunStopped:
            raise
        except Exception as error:  # noqa: BLE001  (one bad answer of a policy, a page or a server must not end the step)
            if isinstance(error, TimeoutError) and deadline.expired():
                return Trajectory([0], Status.ENGINE_FAILED, reason=f"not finished within rollout.deadline_s={self._config.deadline_s:g}")
            reason = self._crashes.record(f"sample {plan.sample} of question {group.prompt.id}", error)
            return Trajectory([0], Status.CRASHED, reason=reason)

    async def _alone(self, growing: Coroutine[Any, Any, list[Trajectory]], group: RolloutGroup, samples: int) -> list[Trajectory]:
        """A group's trajectories; if deciding on forks raises an unexpected error, all of them are CRASHED."""
        try:
            return await growing
        except RunStopped:
            raise
        except Exception as error:  # noqa: BLE001  (as for a trajectory)
            reason = self._crashes.record(f"question {group.prompt.id}", error)
            return [Trajectory([0], Status.CRASHED, reason=reason) for _ in range(samples)]


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results, in order; if one raises, the others are cancelled first."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _first(work: Sequence[Coroutine[Any, Any, Trajectory]], count: int) -> list[Trajectory]:
    """The trajectories, in order; when `count` trainable ones have ended, the others are cancelled and LATE."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        ended = 0
        for ending in asyncio.as_completed(tasks):
            ended += (await ending).status.is_trainable
            if ended >= count:
                break
    finally:
        late = [task for task in tasks if task.cancel()]
        await asyncio.gather(*tasks, return_exceptions=True)
    return [Trajectory([0], Status.LATE, reason=f"{count} others had ended") if task in late else task.result() for task in tasks]


def _check_failures(ends: Sequence[Trajectory], search: Tally, allowed: float) -> None:
    """Raise RolloutFailure if more than the share `allowed` of trajectories or of searches failed."""
    reasons = Counter(end.reason for end in ends if end.status.is_failure)
    for what, failures, total in (("trajectories", reasons, len(ends)), ("searches", search.failures, search.calls)):
        failed = failures.total()
        if failed > allowed * total:
            reason, count = failures.most_common(1)[0]
            raise RolloutFailure(
                f"{failed} of {total} {what} failed, more than rollout.max_failed_fraction={allowed:g}; most often ({count}): {reason}"
            )
