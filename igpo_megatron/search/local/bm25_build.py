"""Build a BM25 index on disk, in bm25s's format, from a stream of passages: memory does not hold the corpus.

pass 1   passage ──words──> postings (word, passage, count) spilled to a file; lengths and numbers of passages per word counted
pass 2   a block of postings ──score (Lucene's BM25)──> its place in the index, which is sorted by word

Memory holds the vocabulary, one number per passage and one block. The index equals the one that bm25s would build.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igpo_megatron.data.corpus import Passage
from igpo_megatron.types import UserError

POSTING = np.dtype([("word", np.int32), ("passage", np.int32), ("count", np.int32)])
PASSAGES = 2048
"""Number of passages tokenised at once."""

BLOCK = 2**22
"""Postings placed at once: 48 MiB, and several times that during sorting."""


def build_index(passages: Iterable[Passage], folder: Path, on_placed: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Write the index of `passages` into `folder` and return their number. Read it with `bm25s.BM25.load(folder, mmap=True)`.

    `on_placed`: called with (postings placed, total) during the second pass. UserError if there is nothing to index.
    """
    # Imported here: bm25s brings numba, and vLLM cannot start in a process that has imported numba before it.
    import bm25s

    folder.mkdir(parents=True)
    spilled = folder / "postings"
    words: dict[str, int] = {}
    lengths, frequencies = array("i"), array("q")
    with spilled.open("wb") as file:
        rest = iter(passages)
        while batch := list(islice(rest, PASSAGES)):
            texts = [f"{passage.title} {passage.text}" for passage in batch]
            tokens = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
            file.write(_postings(tokens, words, lengths, frequencies))
    if not words:
        raise UserError("the corpus has no words to search for besides English stopwords")
    scorer = bm25s.BM25()
    assert scorer.method == scorer.idf_method == "lucene", "the formula below is that one"
    _place(spilled, folder, np.array(lengths), np.array(frequencies), scorer.k1, scorer.b, on_placed)
    spilled.unlink()
    words.setdefault("", len(words))  # bm25s's word for a query without known words
    (folder / "vocab.index.json").write_text(json.dumps(words, ensure_ascii=False), encoding="utf-8")
    names = ("k1", "b", "delta", "method", "idf_method", "dtype", "int_dtype", "backend")
    parameters = {name: getattr(scorer, name) for name in names} | {"num_docs": len(lengths), "version": version("bm25s")}
    (folder / "params.index.json").write_text(json.dumps(parameters, indent=4), encoding="utf-8")
    return len(lengths)


def _postings(tokens: list[list[str]], words: dict[str, int], lengths: array[int], frequencies: array[int]) -> bytes:
    """The postings of some passages; updates `words`, `lengths` and `frequencies` (passages per word)."""
    found: list[tuple[int, int, int]] = []
    for passage_words in tokens:
        for word, count in Counter(passage_words).items():
            number = words.setdefault(word, len(words))
            if number == len(frequencies):
                frequencies.append(0)
            frequencies[number] += 1
            found.append((number, len(lengths), count))
        lengths.append(len(passage_words))
    return np.array(found, POSTING).tobytes()


def _place(
    spilled: Path,
    folder: Path,
    lengths: NDArray[Any],
    frequencies: NDArray[Any],
    k1: float,
    b: float,
    on_placed: Callable[[int, int], None],
) -> None:
    """Sort all postings by word, passages in order within a word, and score them."""
    starts = np.zeros(len(frequencies) + 1, np.int64)
    np.cumsum(frequencies, out=starts[1:])
    np.save(folder / "indptr.csc.index.npy", starts)
    total = int(starts[-1])
    scores = np.lib.format.open_memmap(folder / "data.csc.index.npy", "w+", np.float32, (total,))
    places = np.lib.format.open_memmap(folder / "indices.csc.index.npy", "w+", np.int32, (total,))
    idf = np.log(1 + (len(lengths) - frequencies + 0.5) / (frequencies + 0.5)).astype(np.float32)
    norms = k1 * ((1 - b) + b * lengths / lengths.mean())
    next_place = starts[:-1].copy()
    with spilled.open("rb") as file:
        for first in range(0, total, BLOCK):
            block = np.fromfile(file, POSTING, BLOCK)
            block = block[np.argsort(block["word"], kind="stable")]
            word, passage, count = block["word"], block["passage"], block["count"].astype(np.float32)
            numbers, firsts, sizes = np.unique(word, return_index=True, return_counts=True)
            place = next_place[word] + np.arange(len(word)) - np.repeat(firsts, sizes)
            scores[place] = idf[word] * (count / (norms[passage] + count))
            places[place] = passage
            next_place[numbers] += sizes
            on_placed(first + len(block), total)
    scores.flush()
    places.flush()
