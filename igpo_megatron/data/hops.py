"""Questions with the chain of facts behind their answers, for demonstrations.

    extra_info.hops = '[["Isfahan", "country", "Iran"], ["Iran", "currency", "Iranian Rial"]]'

Every entity stands in the question or is the value of an earlier fact, and the last value is an answer: such a chain can be followed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igpo_megatron.algorithms.outcomes import normal_form
from igpo_megatron.data.layouts import LayoutName
from igpo_megatron.data.problems import Problem, shown
from igpo_megatron.data.prompts import permutation
from igpo_megatron.data.question_files import read_extra, read_prompts
from igpo_megatron.types import Hop, Prompt, UserError
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

logger = logging.getLogger(__name__)

COLUMN = "extra_info.hops"
FORM = "JSON [[entity, relation, value], ...]"


@dataclass(frozen=True, slots=True)
class ChainQuestion:
    """A question and the facts that lead to its answer, in order."""

    prompt: Prompt
    hops: tuple[Hop, ...]


def read_chains(path: Path, layout: LayoutName = "auto", outcome: str = "f1") -> list[ChainQuestion]:
    """The questions of a file whose chain can be followed, in row order; others are left out, which is logged.

    Raises UserError as `read_prompts`, and if no question has such a chain.
    """
    prompts, column = read_prompts(path, layout, outcome), read_extra(path, "hops")
    if not column:
        raise UserError(
            f"{path}: no row has a column {COLUMN}; demonstrations follow the facts behind an answer, so give every row {FORM}, as "
            "tools/prepare_data.py does for its sets"
        )
    chains, problems = list[ChainQuestion](), list[str]()
    for prompt in prompts:
        try:
            hops = _hops(column.get(prompt.id))
            _require_chain(prompt, hops, outcome)
        except ValueError as error:
            problems.append(f"question {prompt.id}: {Problem(str(error), column=COLUMN)}")
        else:
            chains.append(ChainQuestion(prompt, hops))
    if problems:
        notice = f"{path}: {len(problems)} of {len(prompts)} questions are left out; the first: {problems[0]}"
        if not chains:
            raise UserError(notice)
        logger.warning("%s", notice)
    return chains


def _hops(value: Any) -> tuple[Hop, ...]:
    """Raises ValueError saying what was found."""
    if isinstance(value, str):
        try:
            value = json_loads_untrusted(value)
        except BadJson as error:
            raise ValueError(f"found text that is not JSON ({error}), expected {FORM}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"found {shown(value)}, expected {FORM}")
    for hop in value:
        if not isinstance(hop, list) or len(hop) != 3 or not all(isinstance(text, str) and text.strip() for text in hop):
            raise ValueError(f"found the fact {shown(hop)}, expected [entity, relation, value], three texts")
    return tuple(Hop(*(text.strip() for text in hop)) for hop in value)


def _require_chain(prompt: Prompt, hops: Sequence[Hop], outcome: str) -> None:
    """Raises ValueError if an agent could not follow the facts from the question to its answer."""
    known = prompt.question.lower()
    for hop in hops:
        if hop.entity.lower() not in known:
            raise ValueError(f"{shown(hop.entity)} stands neither in the question nor among the values before it")
        known += f"\n{hop.value.lower()}"
    if normal_form(hops[-1].value, outcome) not in {normal_form(answer, outcome) for answer in prompt.answers}:
        raise ValueError(f"the last value {shown(hops[-1].value)} is none of the answers, the first of which is {shown(prompt.answers[0])}")


def split(chains: Sequence[ChainQuestion], share: float) -> tuple[list[ChainQuestion], list[ChainQuestion]]:
    """(the others, held out): about `share` of the entities with which chains begin, with all of their questions.

    The same ones for every seed of demonstrations, so that several files can share what they hold out. Raises
    UserError if either part would be empty.
    """
    entities = sorted({chain.hops[0].entity for chain in chains})
    count = round(share * len(entities)) or (1 if share else 0)
    if share and count >= len(entities):
        raise UserError(
            f"--held-out {share:g} holds out all {len(entities)} entities with which the questions begin; hold out less, or "
            "give more questions"
        )
    held_out = {entities[place] for place in permutation(len(entities), "held out")[:count]}
    kept: list[ChainQuestion] = [chain for chain in chains if chain.hops[0].entity not in held_out]
    return kept, [chain for chain in chains if chain.hops[0].entity in held_out]


def endless(chains: Sequence[ChainQuestion], balance: Literal["none", "source"], seed: int | str) -> Iterator[ChainQuestion]:
    """All questions again and again, each time in another order; with `balance=source`, every source gives one in turn."""
    rng = random.Random(f"{seed}")
    sources: dict[str, list[ChainQuestion]] = {}
    for chain in chains:
        sources.setdefault(chain.prompt.source if balance == "source" else "", []).append(chain)
    waiting: dict[str, list[ChainQuestion]] = {name: [] for name in sorted(sources)}
    while waiting:
        for name in rng.sample(list(waiting), len(waiting)):
            waiting[name] = waiting[name] or rng.sample(sources[name], len(sources[name]))
            yield waiting[name].pop()
