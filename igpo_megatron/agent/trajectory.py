"""One trajectory: think, search, read, think again, answer. The loop every reader should see first."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.chat.format import Answer, ChatFormat, Malformed
from igpo_megatron.chat.protocols.registry import PROTOCOLS
from igpo_megatron.engines.api import Engine
from igpo_megatron.engines.recorded_experts import first_unrouted, record_experts
from igpo_megatron.search.results import SearchClient, SearchResult
from igpo_megatron.supervision.waits import ENGINES, ROLLOUTS, waiting
from igpo_megatron.tools.base import Observed, Tool
from igpo_megatron.tools.tally import why_failed
from igpo_megatron.types import Completion, Node, NodeKind, RolloutGroup, Status, ToolCall, Trajectory
from igpo_megatron.untrusted import clean_text

if TYPE_CHECKING:
    from igpo_megatron.agent.prober import Prober


class TurnWatch(Protocol):
    """Whatever wants to know of every turn before it is sampled, or how sure the policy was at its beginning."""

    @property
    def tokens(self) -> int:
        """Tokens to measure; 0 samples every turn in one piece and measures nothing."""
        ...

    @property
    def top_logprobs(self) -> int:
        """As for `Engine.generate`, not 0 where tokens are measured."""
        ...

    async def begins(self, path: Sequence[int], turn: int) -> bool:
        """Turn `turn` is about to be sampled behind `path`, whose probes are under way; True asks the policy for its answer at once."""
        ...

    async def measured(self, path: Sequence[int], turn: int, entropies: Sequence[float]) -> None:
        """`entropies`, nats, of the first tokens that turn `turn` samples behind `path`; the turn goes on when this returns."""
        ...


async def run_trajectory(
    group: RolloutGroup,
    *,
    engine: Engine,
    search: SearchClient,
    tools: Mapping[str, Tool],
    chat: ChatFormat,
    config: Rollout,
    prober: Prober | None,
    temperature: float,
    probe_tokens: int,
    seed: int,
    step: int,
    sample: int | str,
    start: Sequence[int] = (0,),
    watch: TurnWatch | None = None,
) -> Trajectory:
    """Grow one path of `group`, whose node 0 is the prompt, and say how it ended.

    `probe_tokens` are kept free at the end of the context, so that every state can be probed. A `prober` is told of every state
    before the turn that continues it is sampled, and scores it meanwhile. `start`: the path to continue, up to a prompt or a tool
    result. `watch` is told of every turn and of its first tokens; where it says so, `chat.asking_ids` are forced before the turn, which
    must then end in an answer.
    """
    path = list(start)
    used = len(group.context(path[-1]))
    room = config.max_context - probe_tokens
    for turn in range(group.nodes[path[-1]].turn + 1, config.max_turns + 1):
        opening_ids, opening = chat.opening(turn)
        if opening_ids:
            path.append(_shared_child(group, path[-1], "forced", opening_ids, opening, turn))
            used += len(opening_ids)
        if used >= room:
            return Trajectory(path, Status.TRUNCATED_CONTEXT)
        if prober is not None:
            prober.start(path[-1])
        asked = watch is not None and await watch.begins(path, turn)
        if asked:
            path.append(_shared_child(group, path[-1], "asking", chat.asking_ids, chat.asking_text, turn))
            used += len(chat.asking_ids)
            room = config.max_context  # no probe follows; what was kept free for one holds this text and an answer
        max_tokens = min(config.max_tokens_per_turn, room - used)
        seeds = (seed, step, group.prompt.id, sample, turn)
        generate = partial(engine.generate, temperature=temperature, key=group.prompt.id)
        if config.routing_replay:
            generate = partial(generate, experts_from=first_unrouted(group, path[-1]))
        with waiting(f"turn {turn} of question {group.prompt.id}", on=ENGINES, who=ROLLOUTS):
            if watch is None or not watch.tokens:
                completion = await generate(group.context(path[-1]), max_tokens=max_tokens, seed=counter_seed(*seeds))
            else:
                completion = await _watched(
                    generate, group.context(path[-1]), max_tokens, seeds, chat, partial(watch.measured, path, turn), watch
                )
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
            shown = await _use_tool(wanted, search, tools, chat, config)
        if shown.failure is not None:
            status = Status.TOOL_FAILED if config.failed_search == "mask" else Status.ENDED_BY_TOOL
            return Trajectory(path, status, reason=shown.failure)
        ended_by = completion.token_ids[-1]
        frame = chat.frame_size(ended_by)
        budget = min(config.max_observation_tokens + frame, room - used - len(chat.opening(turn + 1)[0]) - 1)
        if budget <= frame:
            return Trajectory(path, Status.TRUNCATED_CONTEXT)
        ids, cut = chat.observation(shown.text, budget, ended_by)
        path.append(group.add(Node(path[-1], "observation", ids, turn, cut)))
        used += len(ids)
    raise AssertionError("the last turn always ends the trajectory")


async def _watched(
    generate: Callable[..., Awaitable[Completion]],
    context: list[int],
    max_tokens: int,
    seeds: tuple[object, ...],
    chat: ChatFormat,
    measured: Callable[[Sequence[float]], Awaitable[None]],
    watch: TurnWatch,
) -> Completion:
    """One turn in two requests: its first tokens, of which `measured` is told, and the rest, which the prefix cache makes cheap."""
    some = min(watch.tokens, max_tokens)
    first = await generate(context, max_tokens=some, seed=counter_seed(*seeds), top_logprobs=watch.top_logprobs)
    if first.entropies:
        await measured(first.entropies)
    if first.finish != "length" or some == max_tokens:
        return first
    # The second request computes the last token of the first, so its experts follow without a gap.
    follows = {"experts_from": first.experts_from + len(first.experts)} if first.experts else {}
    rest = await generate(context + first.token_ids, max_tokens=max_tokens - some, seed=counter_seed(*seeds, "rest"), **follows)
    ids, logprobs = first.token_ids + rest.token_ids, first.logprobs + rest.logprobs
    # A stop string across the seam is seen by neither request.
    stop = chat.first_stop(ids, some)
    finish = rest.finish if stop is None or rest.finish == "abort" else "stop"
    return Completion(
        ids[:stop],
        logprobs[:stop],
        finish,
        min(first.weight_version, rest.weight_version),
        experts_from=first.experts_from,
        experts=first.experts + rest.experts,
    )


async def _use_tool(call: ToolCall, search: SearchClient, tools: Mapping[str, Tool], chat: ChatFormat, config: Rollout) -> Observed:
    """What the policy is shown, or why the tool failed: a failure is never shown as an empty result."""
    if call.name in tools:
        return await tools[call.name].use(call.queries)
    if call.name != config.tool_name:
        names = [config.tool_name, *tools]
        known = f"The only tool is {names[0]}." if len(names) == 1 else f"The tools are {', '.join(names)}."
        return Observed(f"There is no tool named {call.name}. {known}")
    results = await search.search(call.queries)
    for result in results:
        if not result.status.is_answer:
            return Observed("", failure=why_failed(result))
    return Observed(render_results(results, chat.protocol.hit))


def render_results(results: Sequence[SearchResult], hit: str = PROTOCOLS["igpo"].hit) -> str:
    """Passages, one per line, each written as `hit`; several queries get a heading each."""
    blocks = []
    for result in results:
        passages = enumerate(result.passages, start=1)
        lines = [hit.format(rank=rank, title=passage.title, text=passage.text) for rank, passage in passages]
        body = "\n".join(lines) or "No results."
        blocks.append(body if len(results) == 1 else f"Results for: {result.query}\n{body}")
    return "\n\n".join(blocks)


def counter_seed(*parts: object) -> int:
    """A sampling seed that depends on what is sampled, not on what was sampled before: [0, 2^31)."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


def _shared_child(group: RolloutGroup, parent: int, kind: NodeKind, token_ids: list[int], text: str, turn: int) -> int:
    """Text that nobody samples below `parent`, shared by all samples that continue from there."""
    for number, node in enumerate(group.nodes):
        if node.parent == parent and node.kind == kind:
            return number
    return group.add(Node(parent, kind, list(token_ids), turn, text))
