"""BM25 over a corpus in memory: the index, and the client that searches it in-process.

passages --tokenise title + text, drop English stopwords--> bm25s --scores--> top k above zero, ties by position in the corpus

The cost of a query is the number of postings of its words, not the size of the corpus, unless many passages contain its words.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.backend import SearchBackend
from igpo_megatron.search.results import SearchResult
from igpo_megatron.search.settings import Search
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

CACHED_QUERIES = 65_536
"""Distinct (query, k) whose hits are cached; policies repeat queries often."""

COMMON = 0.25
"""Share of postings to passages above which a query is scored faster in full arrays."""

Hits = tuple[tuple[Passage, float], ...]
"""(passage, score), best first; scores are above zero."""


class Bm25Index:
    """Okapi BM25 (Lucene's variant, the default of bm25s) over title and text. Safe to use from several threads."""

    def __init__(self, passages: Iterable[Passage], *, folder: Path | None = None, show_progress: bool = False):
        """`folder`: the index of these passages on disk; read if it exists, else written.

        UserError if there is nothing to index, or the folder belongs to another corpus.
        """
        # Imported here: bm25s brings numba, and vLLM cannot start in a process that has imported numba before it.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.passages = some_passages(passages)
        self._tokenize = bm25s.tokenize
        if folder is not None and folder.is_dir():
            self._scorer = _read(folder, len(self.passages))
        else:
            self._scorer = _build(self.passages, show_progress)
            if folder is not None:
                with whole(folder) as part:
                    self._scorer.save(part, show_progress=False)
        self._sums = threading.local()
        self._cached = lru_cache(maxsize=CACHED_QUERIES)(self._search)

    def search(self, query: str, k: int) -> Hits:
        """At most `k` passages that share a word with the query."""
        return self._cached(query, k)

    def _search(self, query: str, k: int) -> Hits:
        words = self._tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [word for word in words if word in self._scorer.vocab_dict]
        if not known:
            return ()
        positions, scores = self._score(known)
        k = min(k, len(scores))
        # All passages that tie with the k-th best are sorted, so that ties do not depend on how numpy partitions.
        candidates = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        best = candidates[np.lexsort((positions[candidates], -scores[candidates]))][:k]
        return tuple((self.passages[position], float(score)) for position, score in zip(positions[best], scores[best], strict=True))

    def _score(self, words: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(positions, scores) of the passages that contain one of the words, each once, unordered."""
        index = self._scorer.scores
        tokens = [self._scorer.vocab_dict[word] for word in words]
        postings = [slice(index["indptr"][token], index["indptr"][token + 1]) for token in tokens]
        if sum(part.stop - part.start for part in postings) > len(self.passages) * COMMON:
            everywhere = self._scorer.get_scores(words)
            positions = np.flatnonzero(everywhere > 0)
            return positions, everywhere[positions]
        if not hasattr(self._sums, "values"):
            self._sums.values = np.zeros(len(self.passages), np.float32)
        sums, found = self._sums.values, []
        for part in postings:
            positions = index["indices"][part]
            before = sums[positions]
            found.append(positions[before == 0])
            sums[positions] = before + index["data"][part]
        positions = np.concatenate(found)
        scores = sums[positions]
        sums[positions] = 0  # all zero again for the thread's next query
        return positions, scores


def some_passages(passages: Iterable[Passage]) -> tuple[Passage, ...]:
    """All passages. UserError if there are none."""
    found = tuple(passages)
    if not found:
        raise UserError("the corpus has no passages; expected at least one line of {id, title, text} or {id, contents}")
    return found


def _build(passages: Sequence[Passage], show_progress: bool) -> Any:
    import bm25s

    texts = [f"{passage.title} {passage.text}" for passage in passages]
    tokens = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=show_progress)
    if not any(tokens):
        raise UserError("the corpus has no words to search for besides English stopwords")
    scorer = bm25s.BM25()
    scorer.index(tokens, show_progress=show_progress)
    return scorer


def _read(folder: Path, num_passages: int) -> Any:
    import bm25s

    scorer = bm25s.BM25.load(folder, mmap=True, show_progress=False)
    if scorer.scores["num_docs"] != num_passages:
        raise UserError(
            f"{folder} is the index of {scorer.scores['num_docs']} passages, the corpus has {num_passages}; remove it, or name another"
        )
    # Plain views of the mapped files: slices of numpy's memmap class cost a Python call each.
    scorer.scores |= {name: np.asarray(scorer.scores[name]) for name in ("data", "indices", "indptr")}
    return scorer


class CorpusClient(SearchBackend):
    """SearchClient over the passages of `search.corpus`, in this process."""

    needs: ClassVar[tuple[tuple[str, str], ...]] = (("corpus", ", a file of JSON lines {id, title, text}"),)
    in_process = True

    def __init__(self, index: Any, top_k: int):
        self.index, self.top_k = index, top_k

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """Missing settings, and a missing file."""
        yield from super().problems(search)
        if search.corpus is not None and not search.corpus.is_file():
            yield f"search.corpus={search.corpus}: no such file; expected JSON lines {{id, title, text}}"

    async def close(self) -> None:
        """Nothing to release."""


class Bm25Client(CorpusClient):
    """SearchClient over a `Bm25Index`."""

    provider = "bm25"
    decides = ("corpus", "top_k")

    @classmethod
    def open(cls, search: Search) -> Bm25Client:
        """Read and index the corpus. UserError names the line at fault."""
        assert search.corpus is not None
        return cls(Bm25Index(read_corpus(search.corpus)), search.top_k)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query: ok or empty."""
        results = []
        for query in queries:
            start = time.perf_counter()
            # In a thread: over a large corpus a query takes long enough to delay every other trajectory.
            hits = await asyncio.to_thread(self.index.search, query, self.top_k)
            results.append(SearchResult.answered(query, self.provider, [passage for passage, _ in hits], time.perf_counter() - start))
        return results
