"""One trajectory: think, search, read, think again, answer. Read this loop first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from igpo_megatron.agent.prober import Prober
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.chat.format import Answer, ChatFormat, Malformed
from igpo_megatron.chat.room import probe_tokens
from igpo_megatron.engines.api import Engine
from igpo_megatron.engines.recorded_experts import first_unrouted, record_experts
from igpo_megatron.supervision.waits import ENGINES, ROLLOUTS, waiting
from igpo_megatron.tools.base import Observed, Tool
from igpo_megatron.types import Completion, Node, NodeKind, RolloutGroup, SamplingRequest, Status, ToolCall, Trajectory
from igpo_megatron.untrusted import clean_text


class TurnWatch:
    """Observes the turns of a path. The defaults measure nothing and never ask for an early answer."""

    @property
    def tokens(self) -> int:
        """First tokens of every turn to measure; 0 samples turns in one request and measures nothing."""
        return 0

    @property
    def top_logprobs(self) -> int:
        """As in `SamplingRequest`; not 0 if tokens are measured."""
        return 0

    async def begins(self, path: Sequence[int], turn: int) -> bool:
        """Called before turn `turn` is sampled behind `path`, whose probes are running; True asks the policy for its answer at once."""
        return False

    async def measured(self, path: Sequence[int], turn: int, entropies: Sequence[float]) -> None:
        """Called with the `entropies`, nats, of the first tokens of turn `turn` behind `path`; the turn continues when this returns."""


UNWATCHED = TurnWatch()
"""For paths that nobody observes."""


@dataclass(frozen=True, slots=True)
class Agent:
    """Shared by all paths."""

    engine: Engine
    tools: Mapping[str, Tool]
    """By our names, search first."""

    chat: ChatFormat
    config: Rollout


@dataclass(frozen=True, slots=True)
class PathPlan:
    """The inputs of one path."""

    sample: int | str
    """Its label: the number of a sample, `3.2.0` for a fork."""

    seed: int
    salt: int | str
    """The training step or the kind of evaluation; sampling depends on it besides seed, question, sample and turn."""

    temperature: float
    start: Sequence[int] = (0,)
    """The path to continue, up to a prompt or a tool result."""

    prober: Prober | None = None
    """Scores every state while the turn that continues it is sampled."""

    watch: TurnWatch = UNWATCHED
    """Observes every turn and its first tokens. If its `begins` returns True, `chat.asking_ids` are forced before the turn, which must
    then end in an answer."""


async def run_trajectory(group: RolloutGroup, agent: Agent, plan: PathPlan) -> Trajectory:
    """Grow one path of `group`, whose node 0 is the prompt; returns how it ended.

    The longest probe's tokens are kept free at the end of the context, so that every state can be probed.
    """
    chat, config = agent.chat, agent.config
    path = list(plan.start)
    used = len(group.context(path[-1]))
    room = config.max_context - probe_tokens(group.prompt, chat)
    for turn in range(group.nodes[path[-1]].turn + 1, config.max_turns + 1):
        opening_ids, opening = chat.opening(turn)
        if opening_ids:
            path.append(_shared_child(group, path[-1], "forced", opening_ids, opening, turn))
            used += len(opening_ids)
        if used >= room:
            return Trajectory(path, Status.TRUNCATED_CONTEXT)
        if plan.prober is not None:
            plan.prober.start(path[-1])
        asked = await plan.watch.begins(path, turn)
        if asked:
            path.append(_shared_child(group, path[-1], "asking", chat.asking_ids, chat.asking_text, turn))
            used += len(chat.asking_ids)
            room = config.max_context  # no probe follows; the space kept free for one holds this text and an answer
        max_tokens = min(config.max_tokens_per_turn, room - used)
        completion = await _sample(group, path, turn, max_tokens, agent, plan)
        text = clean_text(chat.decode(completion.token_ids))
        action = Node(path[-1], "action", completion.token_ids, turn, text, completion.weight_version, completion.logprobs)
        path.append(group.add(action))
        record_experts(group, path[-1], completion)
        used += len(completion.token_ids)
        if completion.finish == "abort":
            return Trajectory(path, Status.ENGINE_FAILED, reason="the engine aborted the request")
        if completion.finish == "length":
            return Trajectory(path, Status.TRUNCATED_TOKENS if max_tokens == config.max_tokens_per_turn else Status.TRUNCATED_CONTEXT)
        wanted = chat.parse(opening + (chat.asking_text if asked else "") + text)
        if asked and isinstance(wanted, ToolCall):
            wanted = Malformed("asked for its answer, the policy called a tool")
        if isinstance(wanted, Answer):
            return Trajectory(path, Status.FINISHED, answer=wanted.text)
        if isinstance(wanted, Malformed):
            return Trajectory(path, Status.BAD_FORMAT, reason=wanted.reason)
        action.call = wanted
        if turn == config.max_turns:
            return Trajectory(path, Status.TRUNCATED_TURNS)
        with waiting(f"the result of turn {turn} of question {group.prompt.id}", on=f"the tool {wanted.name}", who=ROLLOUTS):
            shown = await _use_tool(wanted, agent)
        if shown.failure is not None:
            status = Status.TOOL_FAILED if config.failed_search == "mask" else Status.ENDED_BY_TOOL
            return Trajectory(path, status, reason=shown.failure)
        if not _add_result(group, path, shown.text, room - used, chat, config):
            return Trajectory(path, Status.TRUNCATED_CONTEXT)
        used += len(group.nodes[path[-1]].token_ids)
    raise AssertionError("the last turn always ends the trajectory")


async def _sample(group: RolloutGroup, path: Sequence[int], turn: int, max_tokens: int, agent: Agent, plan: PathPlan) -> Completion:
    """Sample one turn behind `path`.

    A measured turn takes two requests: its first tokens, which `watch` measures, and the rest, which the prefix cache makes cheap.
    """
    seeds, watch = (plan.seed, plan.salt, group.prompt.id, plan.sample, turn), plan.watch
    routed = first_unrouted(group, path[-1]) if agent.config.routing_replay else None
    context, seed = group.context(path[-1]), counter_seed(*seeds)
    whole = SamplingRequest(context, max_tokens, plan.temperature, seed, group.prompt.id, experts_from=routed)
    with waiting(f"turn {turn} of question {group.prompt.id}", on=ENGINES, who=ROLLOUTS):
        if not watch.tokens:
            return await agent.engine.generate(whole)
        some = min(watch.tokens, max_tokens)
        first = await agent.engine.generate(replace(whole, max_tokens=some, top_logprobs=watch.top_logprobs))
        if first.entropies:
            await watch.measured(path, turn, first.entropies)
        if first.finish != "length" or some == max_tokens:
            return first
        if first.experts:  # the second request computes the last token of the first, so its experts follow without a gap
            routed = first.experts_from + len(first.experts)
        context, seed = context + first.token_ids, counter_seed(*seeds, "rest")
        rest = await agent.engine.generate(replace(whole, token_ids=context, max_tokens=max_tokens - some, seed=seed, experts_from=routed))
    ids, logprobs = first.token_ids + rest.token_ids, first.logprobs + rest.logprobs
    # Neither request sees a stop string that spans both.
    stop = agent.chat.first_stop(ids, some)
    finish = rest.finish if stop is None or rest.finish == "abort" else "stop"
    version = min(first.weight_version, rest.weight_version)
    experts = first.experts + rest.experts
    return Completion(ids[:stop], logprobs[:stop], finish, version, experts_from=first.experts_from, experts=experts)


async def _use_tool(call: ToolCall, agent: Agent) -> Observed:
    """The tool's result, or why it failed; a failure is never shown as an empty result."""
    if call.name in agent.tools:
        return await agent.tools[call.name].use(call.queries)
    called, *names = (agent.chat.tool_name(name) for name in (call.name, *agent.tools))
    known = f"The only tool is {names[0]}." if len(names) == 1 else f"The tools are {', '.join(names)}."
    return Observed(f"There is no tool named {called}. {known}")


def _add_result(group: RolloutGroup, path: list[int], text: str, room: int, chat: ChatFormat, config: Rollout) -> bool:
    """Append a tool's result to `path`, cut so that one more token fits in `room`; False if nothing of it fits."""
    before = group.nodes[path[-1]]
    ended_by = before.token_ids[-1]
    frame = chat.frame_size(ended_by)
    budget = min(config.max_observation_tokens + frame, room - len(chat.opening(before.turn + 1)[0]) - 1)
    if budget <= frame:
        return False
    ids, cut = chat.observation(text, budget, ended_by)
    path.append(group.add(Node(path[-1], "observation", ids, before.turn, cut)))
    return True


def counter_seed(*parts: object) -> int:
    """A sampling seed in [0, 2^31) that depends on what is sampled, not on what was sampled before."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def _shared_child(group: RolloutGroup, parent: int, kind: NodeKind, token_ids: list[int], text: str, turn: int) -> int:
    """A node of unsampled text below `parent`, shared by all samples that continue from there."""
    for number, node in enumerate(group.nodes):
        if node.parent == parent and node.kind == kind:
            return number
    return group.add(Node(parent, kind, list(token_ids), turn, text))
