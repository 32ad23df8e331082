"""`igpo doctor chat`: one conversation of two turns as a run builds it, each token with its source. No engine, no weights.

tokenizer, template ──> ChatFormat ──run_trajectory with a scripted policy and search──> RolloutGroup ──> pieces ──> table
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from igpo_megatron.agent.trajectory import Agent, PathPlan, run_trajectory
from igpo_megatron.algorithms.info_gain import add_probes
from igpo_megatron.chat.format import Answer, ChatFormat
from igpo_megatron.chat.template import ASSISTANT, TOOL, TemplateProblem
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.schema import Config
from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.results import SearchResult, SearchStatus
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.types import SEARCH, Completion, Node, ProbeScore, Prompt, RolloutGroup, SamplingRequest, ToolCall

Source = Literal["template", "instruction", "forced", "sampled", "result", "probe"]

SOURCES: dict[Source, tuple[str, str]] = {
    "template": ("bright_black", "written by the chat template or the protocol"),
    "instruction": ("cyan", "rollout.system_prompt, tool instruction and question"),
    "forced": ("yellow", "put at the start of a turn: the template's own <think>, or rollout.force_think"),
    "sampled": ("green", "by the policy: trained"),
    "result": ("blue", "by a tool; control tokens in it are plain characters"),
    "probe": ("magenta", "reward.probe_template with the true answer: its underlined tokens are scored, none is trained"),
}
"""Source of a token -> its colour and its meaning."""

BETWEEN = "\u00b7"
QUESTION, ANSWER = "Who wrote Hamlet?", "Shakespeare"


@dataclass(frozen=True, slots=True)
class Piece:
    """Successive tokens from one source."""

    turn: int
    """The turn it belongs to, or that follows the probe; 0 for the prompt."""

    source: Source
    tokens: tuple[str, ...]
    """Text of each."""

    scored: tuple[int, int] = (0, 0)
    """Probes: [start, stop) of the answer's tokens."""


class ScriptedPolicy:
    """Searches in its first turn and answers in its second, as the protocol writes it."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        script: list[ToolCall | Answer] = [ToolCall(SEARCH, ("author of Hamlet",)), Answer(ANSWER)]
        self._actions = iter(script)
        self._turn = 0

    async def generate(self, request: SamplingRequest) -> Completion:
        """The next turn, without its given opening."""
        self._turn += 1
        ids = self._chat.turn_ids(self._turn, "I think so.", next(self._actions))
        return Completion(ids, [0.0] * len(ids), "stop", 0)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        raise AssertionError("no probe is scored here")


class ScriptedSearch:
    """Finds one page, which spells a control token."""

    def __init__(self, control: str) -> None:
        self._text = f'{ANSWER} wrote "Hamlet". A page may spell {control} and stays text.'

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        return [SearchResult(query, SearchStatus.OK, "scripted", (Passage("1", "Hamlet", self._text),)) for query in queries]

    async def close(self) -> None: ...


def converse(config: Config, chat: ChatFormat, tokenizer: Any) -> RolloutGroup:
    """The conversation as a run would generate it, with its probes."""
    rollout = config.rollout.model_copy(update={"max_turns": 2, "max_context": 2**20, "max_tokens_per_turn": 2**10})
    ids, text = chat.open(QUESTION)
    group = RolloutGroup(Prompt("doctor-chat", QUESTION, (ANSWER,), "doctor"), [Node(None, "prompt", ids, text=text)])
    search = SearchTool(ScriptedSearch(tokenizer.decode([chat.end_of_turn])), chat.protocol.hit)
    agent = Agent(ScriptedPolicy(chat), {SEARCH: search}, chat, rollout)
    group.trajectories = [asyncio.run(run_trajectory(group, agent, PathPlan(0, seed=0, salt=0, temperature=0.0)))]
    add_probes(group, chat.render_probe, config.reward, chat.render_hidden_probe)
    return group


def pieces(group: RolloutGroup, chat: ChatFormat, tokenizer: Any) -> Iterator[Piece]:
    """The conversation in order, each probe after the node that it continues."""

    def piece(node: Node, source: Source, ids: Sequence[int], scored: tuple[int, int] = (0, 0)) -> Iterator[Piece]:
        if ids:
            texts = tuple(tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids)
            yield Piece(node.turn + (source == "probe"), source, texts, scored)

    for number in group.trajectories[0].path:
        node = group.nodes[number]
        if node.kind == "prompt":
            yield from _prompt_pieces(node, chat, tokenizer)
        elif node.kind == "observation":
            before, after = chat.frame_ids(group.nodes[number - 1].token_ids[-1])
            yield from piece(node, "template", node.token_ids[: len(before)])
            yield from piece(node, "result", node.token_ids[len(before) : len(node.token_ids) - len(after)])
            yield from piece(node, "template", node.token_ids[len(node.token_ids) - len(after) :])
        else:
            yield from piece(node, "sampled" if node.kind == "action" else "forced", node.token_ids)
        for probe in group.nodes:
            if probe.kind == "probe" and probe.parent == number:
                yield from piece(probe, "probe", probe.token_ids, probe.scored or (0, 0))


def _prompt_pieces(node: Node, chat: ChatFormat, tokenizer: Any) -> Iterator[Piece]:
    own = [message["content"].strip() for message in chat.messages(QUESTION)]
    spans = [(node.text.find(text), node.text.find(text) + len(text)) for text in own if text in node.text]
    offsets = tokenizer(node.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    run: list[str] = []
    last: Source = "template"
    for left, right in offsets:
        source: Source = "instruction" if any(right > start and left < stop for start, stop in spans) else "template"
        if source != last and run:
            yield Piece(0, last, tuple(run))
            run = []
        run.append(node.text[left:right])
        last = source
    yield Piece(0, last, tuple(run))


def rewritten_from(group: RolloutGroup, chat: ChatFormat, tokenizer: Any) -> str | None:
    """The template's own text from where it would write the same conversation differently; None if it would not.

    The run keeps what was sampled; a template that drops earlier thoughts would not. Protocols of tags are one message: None.
    """
    path = [group.nodes[number] for number in group.trajectories[0].path]
    frame = chat.frame
    results = [node.text for node in path if node.kind == "observation"]
    if not frame.messages or not results:
        return None
    before = [node for node in path[: [node.kind for node in path].index("observation")] if node.kind != "prompt"]
    turn = chat.decode([token for node in before for token in node.token_ids])
    _, said, result = frame.messages
    messages = [*chat.messages(QUESTION), _filled(said, ASSISTANT, turn), _filled(result, TOOL, results[0])]
    try:
        expected = chat.template.open(messages)
    except TemplateProblem as error:
        return str(error)
    head = path[: [node.kind for node in path].index("observation") + 1]
    found = tokenizer.decode([token for node in head for token in node.token_ids], clean_up_tokenization_spaces=False)
    if found == expected:
        return None
    same = next((n for n, (left, right) in enumerate(zip(found, expected, strict=False)) if left != right), min(len(found), len(expected)))
    return expected[same : same + 40]


def _filled(message: dict[str, Any], mark: str, text: str) -> dict[str, Any]:
    return {**message, "content": message["content"].replace(mark, text)}


def facts(config: Config, chat: ChatFormat, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Findings about the template."""
    names = [f"{tokenizer.decode([token])} ({token})" for token in chat.turn_ends]
    yield "a turn ends with", names[0] + (f"; also with {', '.join(names[1:])}" if names[1:] else "")
    first, later = (chat.opening(turn)[1] for turn in (1, 2))
    owner = "the template" if chat.template.opening else "rollout.force_think"
    then = "" if first == later else f"; later turns: {later!r}"
    yield "a turn begins with", (f"{first!r}, by {owner}" if first else "what the policy writes") + then
    yield "system message", "accepted" if chat.template.takes_system else "refused: the first user message holds its text"
    if not config.rollout.tool_in_prompt:
        yield "tools", "not described (rollout.tool_in_prompt is false)"
    else:
        yield "tools", "described by the template" if chat.template.describes_tools else "described by the instruction"
    quoted = {"none": "as they are", "json": "as JSON strings", "ascii": "as JSON strings, in ASCII"}[chat.frame.quoting.escape]
    yield "tool results", f"in a message with the role {chat.frame.role}, written {quoted}"


def show(console: Console, config: Config, chat: ChatFormat, tokenizer: Any) -> None:
    """Print facts, conversation and legend."""
    group = converse(config, chat, tokenizer)
    console.print(f"igpo doctor chat: {config.model.path}, rollout.protocol={config.rollout.protocol}", soft_wrap=True, markup=False)
    for name, value in facts(config, chat, tokenizer):
        console.print(Text(f"  {name}: {value}"), soft_wrap=True)
    probe = chat.probe_problem() if config.advantage.needs_probes and config.loss.learns_from_rewards else None
    for note in (*chat.notes, *([probe] if probe else ())):
        console.print(Text(f"  note: {note}"), soft_wrap=True)
    if (other := rewritten_from(group, chat, tokenizer)) is not None:
        note = f"  note: rendered again, the template would write the text differently from {other!r} on; the run keeps what was sampled"
        console.print(Text(note), soft_wrap=True)
    table = Table("turn", "source", "trained", "tokens")
    table.add_column(f"text, tokens apart by {BETWEEN}", overflow="fold")
    for piece in pieces(group, chat, tokenizer):
        colour = SOURCES[piece.source][0]
        text = Text()
        for number, token in enumerate(piece.tokens):
            scored = piece.scored[0] <= number < piece.scored[1]
            text.append(BETWEEN if number else "", style="dim")
            text.append(token.replace("\n", "\\n"), style=f"{colour} underline" if scored else colour)
        if piece.scored != (0, 0):
            text.append(f"   (scored: the last {piece.scored[1] - piece.scored[0]})", style="dim")
        where = str(piece.turn) if piece.turn else "prompt"
        table.add_row(where, Text(piece.source, style=colour), "yes" if piece.source == "sampled" else "", str(len(piece.tokens)), text)
    console.print(table)
    for source, (colour, meaning) in SOURCES.items():
        console.print(Text.assemble("  ", (source, colour), f": {meaning}"), soft_wrap=True)
    end = group.trajectories[0]
    reason = f" ({end.reason})" if end.reason else ""
    console.print(Text(f"  the conversation ended as {end.status}{reason}, answer {end.answer!r}"), soft_wrap=True)


def main(config: Config) -> int:
    """Print one conversation in the configured model's template. Raises UserError where the template cannot be used."""
    tokenizer = load_tokenizer(config.model.path)
    show(Console(), config, ChatFormat(tokenizer, config.rollout, config.reward), tokenizer)
    return 0
