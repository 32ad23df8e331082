"""Reciprocal rank fusion by numbers that can be checked by hand, and the back-end that asks both indexes."""

from __future__ import annotations

import asyncio
import io
import threading

import numpy as np
import pytest
from rich.console import Console

from igpo_megatron.config.load import build
from igpo_megatron.data.corpus import Passage
from igpo_megatron.doctor import tools as tool_check
from igpo_megatron.search.client import make_client, namespace
from igpo_megatron.search.local import dense
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.search.local.dense import DenseIndex
from igpo_megatron.search.local.hybrid import DEPTH, HybridClient, HybridIndex, fuse
from igpo_megatron.search.results import SearchStatus
from igpo_megatron.search.settings import Search

A, B, C, D = (Passage(name, name, name) for name in "abcd")


def ranked(*rankings, constant=60):
    return [(passage.doc_id, score) for passage, score in fuse(rankings, constant)]


def test_a_passage_scores_the_sum_of_its_reciprocal_ranks():
    found = ranked([A, B, C], [B, D])
    assert [name for name, _ in found] == ["b", "a", "d", "c"]
    assert [score for _, score in found] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63])


def test_the_constant_decides_how_much_a_first_place_counts():
    """a is first once, b third twice: 1/(k+1) against 2/(k+3) are equal at k = 1."""
    rankings = ([A, C, B], [D, Passage("e", "e", "e"), B])
    assert ranked(*rankings, constant=60)[0][0] == "b"
    assert ranked(*rankings, constant=1)[0] == ("a", 0.5)
    assert [ranked(*rankings, constant=k)[0][0] for k in (1, 2)] == ["a", "b"]


def test_ties_go_to_the_earlier_ranking_and_a_passage_counts_once_in_each():
    assert [name for name, _ in ranked([A, C], [B, D])] == ["a", "b", "c", "d"]
    assert [name for name, _ in ranked([B, D], [A, C])] == ["b", "a", "d", "c"]
    assert ranked([A, A, B], []) == [("a", 1 / 61), ("b", 1 / 62)]
    assert ranked([], []) == []


PASSAGES = (Passage("rial", "Iran", "rial money"), Passage("sol", "Peru", "sol coin"), Passage("oslo", "Norway", "oslo city"))
NEAR = ("city", "money", "coin")
"""What the encoder below knows: `capital` is the same to it as `city`."""


def encode(texts):
    same = [text.replace("capital", "city") for text in texts]
    return np.array([[text.count(word) for word in NEAR] for text in same], dtype=np.float32)


def nearest(encode=encode):
    return DenseIndex(PASSAGES, encode, query_prefix="", passage_prefix="")


def test_each_half_finds_what_the_other_does_not():
    words, near = Bm25Index(PASSAGES), nearest()
    index = HybridIndex(words, near, 60)
    assert words.search("capital", 1) == () and words.search("sol", 1)[0][0].doc_id == "sol"
    capital, sol, nothing = index.search(["capital", "sol", " "], 1)
    assert capital[0][0].doc_id == "oslo" and capital[0][1] == pytest.approx(1 / 61)
    assert sol[0][0].doc_id == "sol" and sol[0][1] == pytest.approx(1 / 61 + 1 / 62)  # first by its word; a tie, second, by meaning
    assert nothing == ()


def test_more_than_the_usual_depth_may_be_asked_for():
    many = tuple(Passage(str(number), "t", "word") for number in range(DEPTH + 20))
    near = DenseIndex(many, lambda texts: np.ones((len(texts), 2)), query_prefix="", passage_prefix="")
    index = HybridIndex(Bm25Index(many), near, 60)
    assert [len(index.search(["word"], k)[0]) for k in (3, DEPTH + 20)] == [3, DEPTH + 20]


def test_a_half_that_fails_fails_the_search():
    def broken(texts):
        if texts == ["sol"]:
            raise RuntimeError("the encoder is broken")
        return encode(texts)

    class BrokenWords:
        def search(self, query, k):
            raise RuntimeError("the words are broken")

    for index, what in (
        (HybridIndex(Bm25Index(PASSAGES), nearest(broken), 60), "the encoder is broken"),
        (HybridIndex(BrokenWords(), nearest(), 60), "the words are broken"),
    ):
        with pytest.raises(RuntimeError, match=what):
            asyncio.run(HybridClient(index, 2).search(["sol"]))


def test_both_halves_are_asked_at_the_same_time():
    meeting = threading.Barrier(2, timeout=30)

    class Words:
        def search(self, query, k):
            meeting.wait()
            return ()

    def met(texts):
        if texts == ["sol"]:
            meeting.wait()
        return encode(texts)

    assert HybridIndex(Words(), nearest(met), 60).search(["sol"], 1)[0]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Of the back-end, as a user would write them; the encoder is the one above."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(f'{{"id": "{p.doc_id}", "title": "{p.title}", "text": "{p.text}"}}' for p in PASSAGES))
    monkeypatch.setattr(dense, "sentence_transformer", lambda name: encode)
    monkeypatch.setattr(dense, "find_spec", lambda name: name)
    return Search(backend="hybrid", corpus=corpus, encoder="toy", query_prefix="", passage_prefix="", top_k=2)


def test_the_backend_is_made_from_settings_and_its_constant_is_part_of_what_is_stored(settings):
    async def ask():
        client = make_client(settings)
        results = await client.search(["capital", " "])
        await client.close()
        return results

    capital, blank = asyncio.run(ask())
    assert (capital.status, blank.status) == (SearchStatus.OK, SearchStatus.EMPTY) and capital.provider == "hybrid"
    assert [passage.doc_id for passage in capital.passages] == ["oslo", "rial"]
    assert namespace(settings) != namespace(settings.model_copy(update={"rrf_constant": 10}))


def test_the_check_of_the_tools_asks_it_like_any_other(settings):
    config = build({"model": {"path": "nowhere"}, "search": settings.model_dump(exclude={"chaos"})}, [])
    console = Console(file=io.StringIO(), width=120)
    assert tool_check.main(config, 8, (), console) == 0
    assert "hybrid runs in this process; nothing to set" in console.file.getvalue()
