"""Demonstrations as trajectories: a script in place of the policy, within the real agent loop and with the real search.

    question, script ──run_trajectory──> RolloutGroup       prompt, frames, limits, parsing and results are those of a run

So a demonstration is what the run that learns from it would have recorded, had its policy written these turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from igpo_megatron.agent.demonstrator import Intention, Script
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.agent.trajectory import Agent, PathPlan, run_trajectory
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.room import too_long
from igpo_megatron.tools.base import Tool
from igpo_megatron.types import Completion, Node, ProbeScore, Prompt, RolloutGroup, SamplingRequest, Status, UserError
from igpo_megatron.untrusted import clean_text

AT_ONCE = 64
"""Questions in progress at a time."""

PATIENCE = 100
"""Questions that may be skipped before the share of skipped ones is judged."""


@dataclass(frozen=True, slots=True)
class Task:
    """One demonstration to make."""

    prompt: Prompt
    script: Script


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One that was made."""

    group: RolloutGroup
    intentions: tuple[Intention, ...]
    """Of every turn."""


class ScriptedEngine:
    """An engine that writes what a script intends, for one trajectory of one group."""

    def __init__(self, group: RolloutGroup, script: Script, chat: ChatFormat) -> None:
        self._group, self._script, self._chat = group, script, chat
        self.intentions: list[Intention] = []
        self.refusal: str | None = None
        """Why the protocol could not write a turn, if it could not."""

    async def generate(self, request: SamplingRequest) -> Completion:
        """The script's next turn, cut as an engine would cut it."""
        shown = next((node.text for node in reversed(self._group.nodes) if node.kind == "observation"), "")
        intention = self._script.send(shown) if self.intentions else next(self._script)
        self.intentions.append(intention)
        try:
            ids = turn_that_reads_back(self._chat, len(self.intentions), intention)
        except ValueError as error:
            self.refusal = clean_text(str(error))
            ids = [self._chat.end_of_turn]
        cut = ids[: request.max_tokens]
        return Completion(cut, [], "stop" if cut == ids else "length", 0)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        raise AssertionError("demonstrations have no probes")


def turn_that_reads_back(chat: ChatFormat, turn: int, intention: Intention) -> list[int]:
    """The tokens of turn `turn`. Raises ValueError if the protocol cannot write it, or reads them as another action."""
    ids = chat.turn_ids(turn, intention.thought, intention.action)
    read = chat.parse(chat.opening(turn)[1] + chat.decode(ids))
    if read != intention.action:
        raise ValueError(f"the protocol reads {chat.decode(ids)!r}, which it wrote of {intention.action}, as {read}")
    return ids


def demonstrate(
    tasks: Iterator[Task],
    count: int,
    tools: Mapping[str, Tool],
    chat: ChatFormat,
    config: Rollout,
    runner: asyncio.Runner,
    skipped: Counter[str],
) -> Iterator[Demonstration]:
    """`count` demonstrations, in the order of their tasks; those that do not succeed are counted in `skipped` by reason.

    `tools`: by our names, search included. `runner`: of all calls, since a tool's connections belong to one event loop; the caller closes
    the tools in it. Raises UserError if most demonstrations do not succeed.
    """
    made = 0
    while made < count:
        some = list(islice(tasks, min(AT_ONCE, count - made)))
        for outcome in runner.run(_together(some, tools, chat, config)):
            if isinstance(outcome, Demonstration):
                made += 1
                yield outcome
            else:
                skipped[outcome] += 1
        if skipped.total() > max(PATIENCE, made):
            reason, times = skipped.most_common(1)[0]
            raise UserError(f"{skipped.total()} of {made + skipped.total()} demonstrations did not succeed; most often ({times}): {reason}")


async def _together(tasks: Sequence[Task], tools: Mapping[str, Tool], chat: ChatFormat, config: Rollout) -> list[Demonstration | str]:
    return await asyncio.gather(*(_one(task, tools, chat, config) for task in tasks))


async def _one(task: Task, tools: Mapping[str, Tool], chat: ChatFormat, config: Rollout) -> Demonstration | str:
    """A demonstration, or why there is none."""
    if too_long(task.prompt, chat, config) is not None:
        return f"the question leaves no room for a turn in rollout.max_context={config.max_context}; raise it"
    ids, text = chat.open(task.prompt.question)
    group = RolloutGroup(task.prompt, [Node(None, "prompt", ids, text=text)])
    engine = ScriptedEngine(group, task.script, chat)
    plan = PathPlan(sample=0, seed=0, salt="demonstration", temperature=0.0)
    end = await run_trajectory(group, Agent(engine, tools, chat, config), plan)
    if engine.refusal is not None:
        return engine.refusal
    if end.status is not Status.FINISHED:
        return _why(end.status, end.reason, config)
    if engine.intentions[-1].purpose == "lost":
        return f"the searches did not show the facts within rollout.max_turns={config.max_turns}; allow more turns or search.top_k"
    actions = group.actions(end)
    for node, intention in zip(actions, engine.intentions, strict=True):
        assert node.call == intention.action or node is actions[-1], f"{intention} became {node.call}"
        node.weight_version = None  # no policy wrote it
    group.trajectories.append(end)
    return Demonstration(group, tuple(engine.intentions))


def _why(status: Status, reason: str, config: Rollout) -> str:
    """An end other than an answer, in a sentence that names the setting behind it."""
    if status is Status.TRUNCATED_TOKENS:
        return f"a turn is longer than rollout.max_tokens_per_turn={config.max_tokens_per_turn}; raise it"
    if status is Status.TRUNCATED_CONTEXT:
        return f"it does not fit rollout.max_context={config.max_context}; raise it, or lower rollout.max_observation_tokens"
    return reason or f"it ended as {status.value}"
