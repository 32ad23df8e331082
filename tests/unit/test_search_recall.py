"""What tools/bench/retrieval.py counts, on a corpus of three passages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
sys.path.insert(0, str(BENCH))

import retrieval  # noqa: E402
from retrieval import Asked, queries_per_s, rank, recall, recalls, states  # noqa: E402

from igpo_megatron.data.corpus import Passage  # noqa: E402
from igpo_megatron.types import Hop  # noqa: E402

OMAN, ROMANIA, RIAL = (
    Passage("om", "Oman", "Muscat is the capital of Oman."),
    Passage("ro", "Romania", "Bucharest, not Muscat, is the capital of Romania."),
    Passage("ri", "Omani Rial", "The currency has the code OMR."),
)
CAPITAL = Hop("Oman", "capital", "Muscat")
CODE = Hop("Omani Rial", "code", "OMR")


def test_a_fact_is_stated_by_whole_words_of_title_and_text():
    assert states(OMAN, CAPITAL) and states(RIAL, CODE)
    assert not states(ROMANIA, CAPITAL), "Oman is not in Romania"
    assert not states(OMAN, Hop("Oman", "capital", "Mus")) and states(OMAN, Hop("Oman", "is", "the capital"))


def test_ranks_begin_at_one_and_recall_is_the_share_within_the_first_k():
    assert rank([ROMANIA, OMAN, OMAN], CAPITAL) == 2 and rank([ROMANIA], CAPITAL) == float("inf")
    assert recall([1, 2, 3, float("inf")]) == {"recall_at_1": 0.25, "recall_at_2": 0.5, "recall_at_5": 0.75, "recall_at_10": 0.75}


def test_each_fact_is_looked_for_by_its_query_and_by_the_question():
    answers = {
        "capital of Oman": [ROMANIA, OMAN],
        "code of Omani Rial": [RIAL],
        "What is its capital?": [OMAN],
        "What is the code?": [OMAN, ROMANIA],
    }
    asked = []

    def find(queries, k):
        asked.append((sorted(queries), k))
        return [[(passage, 1.0) for passage in answers[query]] for query in queries]

    found = recalls(find, [Asked("What is its capital?", (CAPITAL,)), Asked("What is the code?", (CAPITAL, CODE))])
    assert asked == [(sorted(answers), 10)], "each text once"
    assert found["query"]["1"]["recall_at_1"] == 0 and found["query"]["1"]["recall_at_2"] == 1
    assert found["query"]["2"]["recall_at_1"] == 0.5 and found["query"]["all"]["recall_at_1"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["question"]["1"]["recall_at_1"] == 1 and found["question"]["2"]["recall_at_10"] == 0.5


def test_no_query_is_timed_twice():
    asked = []

    def find(queries, k):
        asked.extend(queries)
        return [()]

    found = queries_per_s({"one": find, "two": find}, [f"query {number}" for number in range(41)], repeats=2)
    assert len(asked) == len(set(asked)) == 36 and found.keys() == {"one", "two"}


def test_the_tables_of_the_documents_are_the_committed_result():
    """In percent: a row per back-end of recall at each k, a row per number of hops of recall at 5; queries first, then questions."""
    figures = json.loads((BENCH / "results/cpu/retrieval.json").read_text(encoding="utf-8"))["figures"]
    text = (BENCH.parents[1] / "docs/tools-and-search.md").read_text(encoding="utf-8")
    ways, backends = ("query", "question"), ("bm25", "dense", "hybrid")
    for folder, found in figures.items():
        cells = {b: [found[b][way]["all"][f"recall_at_{k}"] for way in ways for k in retrieval.AT] for b in backends}
        cells |= {h: [found[b][way][h]["recall_at_5"] for way in ways for b in backends] for h in found["bm25"]["query"] if h != "all"}
        for name, values in cells.items():
            row = f"| {folder}, {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |"
            assert row in text, row
