"""BM25 over a corpus in memory: the index, and the client that searches it in-process.

passages --tokenise title + text, drop English stopwords--> bm25s --scores--> top k above zero, ties by position in the corpus
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from igpo_megatron.config.schema import Search
from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.results import SearchResult, SearchStatus

CACHED_QUERIES = 65_536
"""Distinct (query, k) whose hits are kept; a policy asks the same things again and again."""

Hits = tuple[tuple[Passage, float], ...]
"""(passage, score), best first; scores are above zero."""


class Bm25Index:
    """Okapi BM25 (Lucene's variant, the default of bm25s) over title and text. Safe to use from several threads."""

    def __init__(self, passages: Iterable[Passage]):
        """ValueError if there is nothing to index."""
        # Imported here: bm25s brings numba, and vLLM cannot start in a process that has imported numba before it.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.passages = tuple(passages)
        if not self.passages:
            raise ValueError("the corpus has no passages; expected at least one line of {id, title, text} or {id, contents}")
        texts = [f"{passage.title} {passage.text}" for passage in self.passages]
        tokens = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        if not any(tokens):
            raise ValueError("the corpus has no words to search for besides English stopwords")
        self._tokenize = bm25s.tokenize
        self._scorer = bm25s.BM25()
        self._scorer.index(tokens, show_progress=False)
        self._cached = lru_cache(maxsize=CACHED_QUERIES)(self._search)

    def search(self, query: str, k: int) -> Hits:
        """At most `k` passages that share a word with the query."""
        return self._cached(query, k)

    def _search(self, query: str, k: int) -> Hits:
        words = self._tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [word for word in words if word in self._scorer.vocab_dict]
        if not known:
            return ()
        scores = self._scorer.get_scores(known)
        k = min(k, len(scores))
        # Everything that ties with the k-th best takes part in the sort, so that ties never depend on how numpy partitions.
        bound = np.partition(scores, -k)[-k]
        candidates = np.flatnonzero((scores >= bound) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
        return tuple((self.passages[position], float(scores[position])) for position in best)


class Bm25Client:
    """SearchClient over a `Bm25Index`."""

    provider = "bm25"

    def __init__(self, index: Bm25Index, top_k: int):
        self.index = index
        self.top_k = top_k

    @classmethod
    def from_config(cls, config: Search) -> Bm25Client:
        """Read and index `search.corpus`. ValueError names the line at fault."""
        if config.corpus is None:
            raise ValueError("search.backend=bm25 needs search.corpus, a file of JSON lines {id, title, text}")
        return cls(Bm25Index(read_corpus(config.corpus)), config.top_k)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query: ok or empty."""
        return [await self._one(query) for query in queries]

    async def close(self) -> None:
        """Nothing to give back."""

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
