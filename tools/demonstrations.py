"""Demonstrations for the demo policy's warm start: a scripted agent searches the real index, with the mistakes RL is to remove.

Everything becomes RolloutGroups in a replay file, so the warm start is a training run like any other (`run.replay`, `loss.name=sft`).
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from demo_policy import CALL_CLOSING, CALL_OPENING, FINAL_THINK
from facts import Question
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.schema import Config
from igpo_megatron.search.client import make_client
from igpo_megatron.tools.search_tool import render_results
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory
from world_facts import World

RELATIONS = ("country", "capital", "currency", "language", "continent", "code")
MAX_TURNS = 4
SUBSTITUTED = 0.6
"""Share of demonstrations whose names are replaced consistently by others: copying is then the only way to be right."""

CLEAN = 0.25
"""Share of demonstrations without mistakes."""

COPY_CHUNKS, COPY_LENGTH, COPY_SIBLINGS = 8, 4, 4


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Chance per turn of answering too early, of a query without its entity, with a wrong relation, or skipping a hop."""

    early: float = 0.15
    vague: float = 0.20
    wrong_relation: float = 0.12
    skip: float = 0.10


NO_MISTAKES = Mistakes(0.0, 0.0, 0.0, 0.0)

Turns = list[tuple[str, str | None]]
"""(what the agent writes, the tool's answer or None for the final turn)."""


class Demonstrator:
    """Writes demonstrations for training questions."""

    def __init__(self, world: World, tokenizer: Any, config: Config) -> None:
        """`config`: the run whose chat format and search they use."""
        self.chat, self.eos = ChatFormat(tokenizer, config.rollout, config.reward), tokenizer.eos_token_id
        client = make_client(config.search)
        self.search = cache(lambda query: render_results(asyncio.run(client.search([query]))))
        self.encode: Callable[[str], list[int]] = partial(tokenizer.encode, add_special_tokens=False)
        self.by_kind: dict[str, list[Question]] = {}
        for question in world.questions:
            if question.split == "train":
                self.by_kind.setdefault(question.kind, []).append(question)
        self.values = {
            relation: sorted(
                {hop.value for questions in self.by_kind.values() for q in questions for hop in q.hops if hop.relation == relation}
            )
            for relation in RELATIONS
        }
        self.single_words = sorted({city.name for city in world.cities if city.country.split == "train"})
        self.currency_words = sorted({currency.split()[-1] for currency in self.values["currency"]})

    def demonstrate(self, rng: random.Random, number: int) -> RolloutGroup:
        """One question with one demonstration."""
        question = rng.choice(self.by_kind[rng.choice(sorted(self.by_kind))])
        turns = self._turns(question, NO_MISTAKES if rng.random() < CLEAN else Mistakes(), rng)
        text = question.text
        if rng.random() < SUBSTITUTED:
            text, turns = self._substitute(question, turns, rng)
        prompt_ids, prompt_text = self.chat.open(text)
        group = RolloutGroup(
            Prompt(f"demo-{number}", text, (question.answer,), question.kind), [Node(None, "prompt", prompt_ids, text=prompt_text)]
        )
        path = [0]
        for turn, (written, observed) in enumerate(turns, start=1):
            call = ToolCall("search", (_query(written),)) if observed is not None else None
            path.append(group.add(Node(path[-1], "action", [*self.encode(written), self.eos], turn, written, call=call)))
            if observed is not None:
                ids, shown = self.chat.observation(observed, 10_000)
                path.append(group.add(Node(path[-1], "observation", ids, turn, shown)))
        group.trajectories.append(Trajectory(path, Status.FINISHED))
        return group

    def _turns(self, question: Question, mistakes: Mistakes, rng: random.Random) -> Turns:
        """Follow the chain of facts; a hop counts as found when entity and value stand in the same passage."""
        turns: Turns = []
        found = 0
        hops = question.hops
        while found < len(hops) and len(turns) < MAX_TURNS - 1:
            hop = hops[found]
            if rng.random() < mistakes.early:
                return [*turns, (_answer(rng.choice([hop.entity, rng.choice(self.values[hops[-1].relation])])), None)]
            query = hop.query
            draw = rng.random() - mistakes.vague
            if draw < 0:
                query = rng.choice([hop.relation, f"{hop.relation} of the country"])
            elif draw < mistakes.wrong_relation:
                query = f"{rng.choice([r for r in RELATIONS if r != hop.relation])} of {hop.entity}"
            elif draw < mistakes.wrong_relation + mistakes.skip and found < len(hops) - 1:
                query = f"{hops[-1].relation} of {hop.entity}"
            observed = self.search(query)
            turns.append((_call(query), observed))
            found += any(hop.entity in line and hop.value in line for line in observed.split("\n"))
        final = question.answer if found == len(hops) else rng.choice(self.values[hops[-1].relation])
        return [*turns, (_answer(final), None)]

    def _substitute(self, question: Question, turns: Turns, rng: random.Random) -> tuple[str, Turns]:
        """Replace the names of the chain by other real names, everywhere alike."""
        replacement: dict[str, str] = {}
        for hop in question.hops:
            for name in (hop.entity, hop.value):
                if name not in replacement:
                    replacement[name] = self._another(name, rng)
        names = sorted(replacement, key=len, reverse=True)
        pattern = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(name)}(?![A-Za-z])" for name in names))

        def swap(text: str) -> str:
            return pattern.sub(lambda match: replacement[match.group(0)], text)

        return swap(question.text), [(swap(written), swap(observed) if observed is not None else None) for written, observed in turns]

    def _another(self, name: str, rng: random.Random) -> str:
        if name in self.values["currency"] and " " in name:
            return f"{rng.choice(self.single_words)} {rng.choice(self.currency_words)}"
        if len(name) == 3 and name.isupper():
            return "".join(rng.choice("ABCDEFGHIJKLMNOPRSTUVWXYZ") for _ in range(3))
        if name in self.values["continent"] and rng.random() < 0.5:
            return name
        return rng.choice(self.single_words)


def copy_exercises(name_ids: Sequence[int], rng: random.Random) -> Iterator[RolloutGroup]:
    """Endless groups: random name pieces in chunks, then the same chunks in other orders; all but a chunk's first token is trained."""
    number = 0
    while True:
        chunks = [[rng.choice(name_ids) for _ in range(COPY_LENGTH)] for _ in range(COPY_CHUNKS)]
        group = RolloutGroup(
            Prompt(f"copy-{number}", "", (), "copy"), [Node(None, "prompt", [token for chunk in chunks for token in chunk])]
        )
        for _ in range(COPY_SIBLINGS):
            path = [0]
            for turn, chunk in enumerate(rng.sample(chunks, len(chunks)), start=1):
                path.append(group.add(Node(path[-1], "forced", chunk[:1], turn)))
                path.append(group.add(Node(path[-1], "action", chunk[1:], turn)))
            group.trajectories.append(Trajectory(path, Status.FINISHED))
        number += 1
        yield group


def _call(query: str) -> str:
    return f"<think>I need the {query}.</think>\n<tool_call>{CALL_OPENING}{query}{CALL_CLOSING}</tool_call>"


def _answer(answer: str) -> str:
    return f"{FINAL_THINK}<answer>{answer}</answer>"


def _query(written: str) -> str:
    return written.partition(CALL_OPENING)[2].partition(CALL_CLOSING)[0]
