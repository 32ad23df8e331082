"""Dense retrieval with an encoder small enough to check by hand."""

from __future__ import annotations

import asyncio
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local.dense import DenseClient, DenseIndex, unit_rows
from igpo_megatron.search.results import SearchStatus
from igpo_megatron.search.settings import Search

PASSAGES = (Passage("a", "Cats", "cat cat"), Passage("b", "Dogs", "dog"), Passage("c", "Both", "cat dog"))
WORDS = ("cat", "dog", "query:", "passage:")


class Counter:
    """Encodes a text as how often each of WORDS is in it."""

    def __init__(self):
        self.texts: list[str] = []

    def __call__(self, texts):
        self.texts += texts
        return np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=np.float64)


def index(encode=None, **changes):
    return DenseIndex(PASSAGES, encode or Counter(), **{"query_prefix": "", "passage_prefix": "", **changes})


def test_the_nearest_by_angle_come_first_and_ties_by_position():
    ((cat, both, dog),), ((tie, _, _),) = index().search(["cat"], 9), index().search(["cat dog"], 9)
    assert [hit[0].doc_id for hit in (cat, both, dog)] == ["a", "c", "b"]
    np.testing.assert_allclose([cat[1], both[1], dog[1]], [1.0, 0.5**0.5, 0.0], atol=1e-6)
    assert tie[0].doc_id == "c"
    assert [[hit[0].doc_id for hit in hits] for hits in index().search(["dog", "nothing"], 1)] == [["b"], ["a"]]


def test_prefixes_are_put_before_queries_and_passages():
    encode = Counter()
    index(encode, query_prefix="query: ", passage_prefix="passage: ").search(["cat"], 1)
    assert encode.texts == ['passage: "Cats"\ncat cat', 'passage: "Dogs"\ndog', 'passage: "Both"\ncat dog', "query: cat"]


def test_vectors_are_kept_in_a_file_and_belong_to_their_texts(tmp_path):
    path = tmp_path / "kept" / "vectors.npz"
    first, again = Counter(), Counter()
    made, read = index(first, vectors=path, encoder="e5"), index(again, vectors=path, encoder="e5")
    assert len(first.texts) == 3 and again.texts == []
    np.testing.assert_array_equal(made.vectors, read.vectors)
    assert [file.name for file in path.parent.iterdir()] == ["vectors.npz"]
    for changes in ({"encoder": "bge"}, {"encoder": "e5", "passage_prefix": "passage: "}):
        with pytest.raises(ValueError, match=r"search\.vectors=.* belongs to another corpus, encoder or passage_prefix"):
            index(vectors=path, **changes)


def test_faiss_is_used_where_it_is_installed(monkeypatch):
    faiss = ModuleType("faiss")

    class IndexFlatIP:
        def __init__(self, width):
            self.width = width

        def add(self, vectors):
            assert vectors.dtype == np.float32 and vectors.flags.c_contiguous and vectors.shape[1] == self.width
            self.vectors = vectors

        def search(self, asked, k):
            rows = np.argsort(-(asked @ self.vectors.T), axis=1, kind="stable")[:, :k]
            return np.take_along_axis(asked @ self.vectors.T, rows, axis=1), rows

    faiss.IndexFlatIP = IndexFlatIP
    plain = index().search(["cat", "dog"], 2)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    made = index()
    assert isinstance(made._nearest.__self__, IndexFlatIP) and made.search(["cat", "dog"], 2) == plain


def test_ties_keep_the_order_of_the_corpus_with_and_without_faiss(monkeypatch):
    twins = tuple(Passage(str(number), "Cats", "cat") for number in range(40))
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, "faiss", None)
        (hits,) = DenseIndex(twins, Counter(), query_prefix="", passage_prefix="").search(["cat"], 40)
        assert [passage.doc_id for passage, _ in hits] == [str(number) for number in range(40)]


def test_a_query_is_encoded_once_and_the_oldest_vectors_are_forgotten(monkeypatch):
    monkeypatch.setattr("igpo_megatron.search.local.dense.CACHED_QUERIES", 2)
    encode = Counter()
    made = index(encode)
    encode.texts.clear()
    assert made.search(["cat", "dog", "cat"], 1) == [*made.search(["cat", "dog"], 1), *made.search(["cat"], 1)]
    assert encode.texts == ["cat", "dog"]
    made.search(["cat dog"], 1)
    made.search(["dog", "cat"], 1)
    assert encode.texts == ["cat", "dog", "cat dog", "cat"]


def test_rows_have_length_one_and_zeros_stay():
    np.testing.assert_allclose(unit_rows(np.array([[3, 4], [0, 0]])), [[0.6, 0.8], [0, 0]], atol=1e-6)


def test_every_query_has_its_result_and_one_without_words_is_empty():
    results = asyncio.run(DenseClient(index(), 2).search(["cat", " ", "dog"]))
    assert [result.status for result in results] == [SearchStatus.OK, SearchStatus.EMPTY, SearchStatus.OK]
    assert [len(result.passages) for result in results] == [2, 0, 2] and results[2].passages[0].doc_id == "b"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "title": "t", "text": "x"}\n')
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"needs sentence-transformers, which is not installed; install igpo-megatron\[dense\]"):
        make_client(Search(backend="dense", corpus=corpus, encoder="e5"))
    with pytest.raises(ValueError, match=r"needs search\.corpus, a file of JSON lines"):
        make_client(Search(backend="dense"))
    with pytest.raises(ValueError, match="the corpus has no passages"):
        DenseIndex((), Counter(), query_prefix="", passage_prefix="")


def test_a_sentence_transformer_is_loaded_by_name(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "title": "t", "text": "cat"}\n{"id": "2", "title": "t", "text": "dog"}\n')
    library = ModuleType("sentence_transformers")
    library.__spec__ = ModuleSpec(library.__name__, None)

    class SentenceTransformer(Counter):
        def __init__(self, name):
            if name == "missing":
                raise OSError("no such model")
            super().__init__()

        def encode(self, texts, *, batch_size, show_progress_bar):
            return self(texts)

    library.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    client = make_client(Search(backend="dense", corpus=corpus, encoder="e5", query_prefix="", passage_prefix="", top_k=1))
    assert asyncio.run(client.search(["dog"]))[0].passages[0].doc_id == "2"
    with pytest.raises(ValueError, match=r"search\.encoder=missing cannot be loaded: no such model"):
        make_client(Search(backend="dense", corpus=corpus, encoder="missing"))
