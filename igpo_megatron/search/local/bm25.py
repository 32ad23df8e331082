"""BM25 over a corpus in memory: the index, and the client that searches it in-process.

passages --tokenise title + text, drop English stopwords--> bm25s --scores--> top k above zero, ties by position in the corpus

A query costs the postings of its words, not the size of the corpus, unless its words are in a good part of all passages.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.backend import SearchBackend, require
from igpo_megatron.search.results import SearchResult, SearchStatus
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError

CACHED_QUERIES = 65_536
"""Distinct (query, k) whose hits are kept; a policy asks the same things again and again."""

COMMON = 0.25
"""Postings of a query, as a share of the passages, from which adding them up in full arrays is faster."""

Hits = tuple[tuple[Passage, float], ...]
"""(passage, score), best first; scores are above zero."""


class Bm25Index:
    """Okapi BM25 (Lucene's variant, the default of bm25s) over title and text. Safe to use from several threads."""

    def __init__(self, passages: Iterable[Passage], *, folder: Path | None = None, show_progress: bool = False):
        """`folder`: keeps the index of these passages; read where it exists, written where it does not.

        ValueError if there is nothing to index, or the folder belongs to another corpus.
        """
        # Imported here: bm25s brings numba, and vLLM cannot start in a process that has imported numba before it.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.passages = tuple(passages)
        if not self.passages:
            raise UserError("the corpus has no passages; expected at least one line of {id, title, text} or {id, contents}")
        self._tokenize = bm25s.tokenize
        if folder is not None and folder.is_dir():
            self._scorer = _read(folder, len(self.passages))
        else:
            self._scorer = _build(self.passages, show_progress)
            if folder is not None:
                _write(self._scorer, folder)
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
        # Everything that ties with the k-th best takes part in the sort, so that ties never depend on how numpy partitions.
        candidates = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
        best = candidates[np.lexsort((positions[candidates], -scores[candidates]))][:k]
        return tuple((self.passages[position], float(score)) for position, score in zip(positions[best], scores[best], strict=True))

    def _score(self, words: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(positions, scores) of the passages that share a word with these, each once, in no order."""
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


def _build(passages: Sequence[Passage], show_progress: bool) -> Any:
    import bm25s

    texts = [f"{passage.title} {passage.text}" for passage in passages]
    tokens = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=show_progress)
    if not any(tokens):
        raise UserError("the corpus has no words to search for besides English stopwords")
    scorer = bm25s.BM25()
    scorer.index(tokens, show_progress=show_progress)
    return scorer


def _write(scorer: Any, folder: Path) -> None:
    """A folder of that name is complete, or not there."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    scorer.save(part, show_progress=False)
    part.replace(folder)


def _read(folder: Path, num_passages: int) -> Any:
    import bm25s

    scorer = bm25s.BM25.load(folder, mmap=True, show_progress=False)
    if scorer.scores["num_docs"] != num_passages:
        raise UserError(
            f"{folder} is the index of {scorer.scores['num_docs']} passages, the corpus has {num_passages}; remove it, or name another"
        )
    # Views of the mapped files: every slice of numpy's own class for them would cost a call in Python.
    scorer.scores |= {name: np.asarray(scorer.scores[name]) for name in ("data", "indices", "indptr")}
    return scorer


class CorpusClient(SearchBackend):
    """SearchClient over the passages of `search.corpus`, in this process."""

    needs: ClassVar[tuple[tuple[str, str], ...]] = (("corpus", ", a file of JSON lines {id, title, text}"),)
    in_process = True

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """What is missing, the file among it."""
        yield from super().problems(search)
        if search.corpus is not None and not search.corpus.is_file():
            yield f"search.corpus={search.corpus}: no such file; expected JSON lines {{id, title, text}}"

    async def close(self) -> None:
        """Nothing to give back."""


class Bm25Client(CorpusClient):
    """SearchClient over a `Bm25Index`."""

    provider = "bm25"
    decides = ("corpus", "top_k")

    def __init__(self, index: Bm25Index, top_k: int):
        self.index = index
        self.top_k = top_k

    @classmethod
    def open(cls, search: Search) -> Bm25Client:
        """Read and index the corpus. UserError names the line at fault."""
        require(cls, search)
        assert search.corpus is not None
        return cls(Bm25Index(read_corpus(search.corpus)), search.top_k)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query: ok or empty."""
        return [await self._one(query) for query in queries]

    async def _one(self, query: str) -> SearchResult:
        start = time.perf_counter()
        # In a thread: over a large corpus a query takes long enough to hold up every other trajectory.
        hits = await asyncio.to_thread(self.index.search, query, self.top_k)
        return SearchResult(
            query=query,
            status=SearchStatus.OK if hits else SearchStatus.EMPTY,
            provider=self.provider,
            passages=tuple(passage for passage, _ in hits),
            latency_s=time.perf_counter() - start,
        )
