"""The in-process index and its client."""

import asyncio
import json
import random
import subprocess
import sys

import pytest

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local import bm25
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.search.results import SearchStatus
from igpo_megatron.search.settings import Search

IRAN = Passage("1", "Iran", "The currency of Iran is the Iranian Rial.")
PERU = Passage("2", "Peru", "The currency of Peru is the Sol.")
LIMA = Passage("3", "Lima", "A city of 9 million people.")


def ids(index, query, k=3):
    return [passage.doc_id for passage, _ in index.search(query, k)]


def test_the_passage_that_shares_most_comes_first_and_scores_fall():
    hits = Bm25Index([LIMA, PERU, IRAN]).search("currency of Iran", 3)
    assert [passage.doc_id for passage, _ in hits] == ["1", "2"]
    assert hits[0][1] > hits[1][1] > 0


def test_the_title_is_searched_too():
    assert ids(Bm25Index([IRAN, LIMA]), "Lima") == ["3"]


@pytest.mark.parametrize("query", ["", "the of and", "zanzibar", "!?"])
def test_a_query_that_shares_no_word_finds_nothing(query):
    assert Bm25Index([IRAN, PERU]).search(query, 3) == ()


def test_ties_come_in_corpus_order_for_every_k():
    twins = [Passage(str(n), "Twin", "same words") for n in range(50)]
    index = Bm25Index([*twins[:25], IRAN, *twins[25:]])
    for k in (1, 7, 30, 50, 99):
        assert ids(index, "twin words", k) == [str(n) for n in range(min(k, 50))]


def test_a_repeated_query_is_answered_from_the_cache():
    index = Bm25Index([IRAN, PERU])
    assert index.search("peru", 1) is index.search("peru", 1)
    assert index.search("currency", 1) != index.search("currency", 2)


def test_adding_up_postings_gives_the_scores_of_the_full_arrays(monkeypatch):
    draw = random.Random(0)
    words = [f"w{n}" for n in range(200)]
    passages = [Passage(str(n), "", " ".join(draw.choices(words, range(1, 201), k=20))) for n in range(500)]
    queries = [" ".join(draw.choices(words, k=4)) for _ in range(100)] + ["w1 w1 w2"]
    index = Bm25Index(passages)
    found = {}
    for share in (0, 4):  # never and always the postings
        monkeypatch.setattr(bm25, "COMMON", share)
        found[share] = [index._search(query, 5) for query in queries]
    assert found[0] == found[4] and sum(map(len, found[0])) > 400


def test_a_kept_index_answers_the_same_and_not_for_another_corpus(tmp_path):
    built = Bm25Index([IRAN, PERU, LIMA], folder=tmp_path / "kept")
    read = Bm25Index([IRAN, PERU, LIMA], folder=tmp_path / "kept")
    assert read.search("currency of Peru", 3) == built.search("currency of Peru", 3)
    with pytest.raises(ValueError, match=r"kept is the index of 3 passages, the corpus has 2; remove it, or name another"):
        Bm25Index([IRAN, PERU], folder=tmp_path / "kept")


@pytest.mark.parametrize(("passages", "message"), [([], "no passages"), ([Passage("1", "the", "of and")], "no words to search for")])
def test_a_corpus_with_nothing_to_index_is_refused(passages, message):
    with pytest.raises(ValueError, match=message):
        Bm25Index(passages)


def test_the_client_gives_one_typed_result_per_query_in_order(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.doc_id, "title": p.title, "text": p.text}) + "\n" for p in (IRAN, PERU, LIMA)))
    client = make_client(Search(backend="bm25", corpus=corpus, top_k=1))
    queries = ["sol", "nothing here", "sol"]
    results = asyncio.run(client.search(queries))
    asyncio.run(client.close())
    assert [result.query for result in results] == queries
    assert [result.status for result in results] == [SearchStatus.OK, SearchStatus.EMPTY, SearchStatus.OK]
    assert [result.passages for result in results] == [(PERU,), (), (PERU,)]
    assert all(result.provider == "bm25" and result.error is None and result.latency_s > 0 for result in results)


def test_a_client_without_corpus_or_with_a_bad_line_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"needs search\.corpus"):
        make_client(Search(backend="bm25"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: field 'title' is missing"):
        make_client(Search(backend="bm25", corpus=bad))


def test_importing_the_clients_loads_neither_bm25s_nor_numba_nor_torch():
    code = "import sys, igpo_megatron.search.client as c; print(sorted({'bm25s', 'numba', 'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
