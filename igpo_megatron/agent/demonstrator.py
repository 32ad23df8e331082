"""A scripted agent that follows a question's chain of facts by searching, with the mistakes that training is to remove.

    hops ──> script ──thought, call──> search ──what it shows──> script ── ... ──> thought, answer

It knows only the question and what its searches have shown: a fact is found when its entity and its value stand in one shown line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from igpo_megatron.chat.protocols.base import Answer
from igpo_megatron.types import SEARCH, Hop, ToolCall

Purpose = Literal["search", "vague", "wrong_relation", "skip", "answer", "early", "lost"]
"""search: an honest query. vague: one without its entity. wrong_relation: one for another relation. skip: one for the last fact, too early.
answer: the right one. early: a guess instead of a search. lost: a guess because the searches did not show the chain."""

QUERIES = ("{relation} of {entity}", "{entity} {relation}", "What is the {relation} of {entity}?")
QUERIES_OF: Mapping[str, tuple[str, ...]] = {"country": (*QUERIES[:2], "Which country does {entity} belong to?")}
"""Relations for which a general wording would be odd."""
VAGUE = ("{relation}", "the {relation}", "what is the {relation}")

FIRST = ("First I need the {relation} of {entity}.", "I start with the {relation} of {entity}.")
NEXT = ("Now I need the {relation} of {entity}.", "Next I look for the {relation} of {entity}.")
ONLY = ("I need the {relation} of {entity}.", "I look for the {relation} of {entity}.")
MISSED = (
    "The results do not say the {relation} of {entity}. I search for exactly that.",
    "This does not show the {relation} of {entity}. I ask for it directly.",
)
FACT = "The {relation} of {entity} is {value}."
DONE = ("That answers the question.", "So I can answer now.")
EARLY = ("I think I know this.", "I can answer this without searching.")
LOST = "I did not find it, so I guess."


@dataclass(frozen=True, slots=True)
class Mistakes:
    """How often the agent goes wrong, as chances."""

    early: float = 0.15
    """Per search: it guesses an answer instead, which ends wrong."""

    query: float = 0.42
    """Per search that it can afford to lose: it asks a wrong query, and searches properly once it has seen the result."""


USUAL, NO_MISTAKES = Mistakes(), Mistakes(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Intention:
    """One turn, before it is written in a protocol."""

    thought: str
    action: ToolCall | Answer
    purpose: Purpose


Script = Generator[Intention, str, None]
"""Gives the next turn and takes what its call has shown; ends after an answer."""


def values_by_relation(chains: Sequence[Sequence[Hop]]) -> dict[str, list[str]]:
    """Relation -> its values in all chains, sorted: what a guess is drawn from."""
    values: dict[str, set[str]] = {}
    for hops in chains:
        for hop in hops:
            values.setdefault(hop.relation, set()).add(hop.value)
    return {relation: sorted(values[relation]) for relation in sorted(values)}


def write_script(
    hops: Sequence[Hop], answers: Sequence[str], values: Mapping[str, Sequence[str]], mistakes: Mistakes, max_turns: int, rng: random.Random
) -> Script:
    """Demonstrate one question whose chain is `hops`; `values` as `values_by_relation`, `max_turns` with that of the answer.

    After a wrong query the next one is honest, and none is asked if too few turns would be left for the rest of the chain.
    """
    found, known, missed = 0, "", False
    unused = _wordings(hops, rng)
    for left in range(max_turns - 1, 0, -1):
        hop = hops[found]
        if rng.random() < mistakes.early:
            yield Intention(_join(known, rng.choice(EARLY)), Answer(_guess(hops, answers, values, rng)), "early")
            return
        if not missed and left > len(hops) - found and rng.random() < mistakes.query:
            purpose, query, asked = _wrong_query(hops, found, values, rng)
        else:
            purpose, query, asked = "search", _fill(unused[hop][0], hop), hop
            unused[hop].append(unused[hop].pop(0))  # another wording if it has to be asked again
        needed = MISSED if missed else NEXT if found else FIRST if len(hops) > 1 else ONLY
        shown = yield Intention(_join(known, _fill(rng.choice(needed), asked)), ToolCall(SEARCH, (query,)), purpose)
        new = count_found(hops[found:], shown)
        missed, known = new == 0, " ".join(_fill(FACT, fact) for fact in hops[found : found + new])
        found += new
        if found == len(hops):
            yield Intention(_join(known, rng.choice(DONE)), Answer(hops[-1].value), "answer")
            return
    yield Intention(LOST, Answer(_guess(hops, answers, values, rng)), "lost")


def count_found(hops: Sequence[Hop], shown: str) -> int:
    """How many facts, from the first on without a gap, a search's result states."""
    lines = shown.split("\n")
    for number, hop in enumerate(hops):
        if not any(_names(line, hop.entity) and _names(line, hop.value) for line in lines):
            return number
    return len(hops)


def _names(line: str, name: str) -> bool:
    return name in line and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line) is not None


def _wordings(hops: Sequence[Hop], rng: random.Random) -> dict[Hop, list[str]]:
    """The wordings of every fact's honest query, in the order of their use."""
    return {hop: rng.sample(forms, len(forms)) for hop in hops for forms in [QUERIES_OF.get(hop.relation, QUERIES)]}


def _wrong_query(hops: Sequence[Hop], found: int, values: Mapping[str, Sequence[str]], rng: random.Random) -> tuple[Purpose, str, Hop]:
    """(purpose, query, the fact that the agent believes to need) in place of `hops[found]`; it names that fact's entity or none."""
    hop, last = hops[found], hops[-1].relation
    others = [relation for relation in values if relation != hop.relation]
    kinds: dict[Purpose, bool] = {"vague": True, "wrong_relation": bool(others), "skip": last != hop.relation}
    purpose = rng.choice([kind for kind, can_be in kinds.items() if can_be])
    if purpose == "vague":
        return purpose, _fill(rng.choice(VAGUE), hop), hop
    wrong = Hop(hop.entity, rng.choice(others) if purpose == "wrong_relation" else last, "")
    return purpose, _fill(rng.choice(QUERIES), wrong), wrong


def _guess(hops: Sequence[Hop], answers: Sequence[str], values: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """A value of the last relation that is not the answer, else the entity in question."""
    wrong = [value for value in values[hops[-1].relation] if value not in (*answers, hops[-1].value)]
    return rng.choice(wrong) if wrong else hops[0].entity


def _fill(form: str, hop: Hop) -> str:
    return form.format(entity=hop.entity, relation=hop.relation, value=hop.value)


def _join(*sentences: str) -> str:
    return " ".join(filter(None, sentences))
