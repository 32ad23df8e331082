"""Hybrid search over a corpus in memory: BM25 and dense vectors, fused by reciprocal rank.

queries ──> BM25  ──> ranking of DEPTH passages ──┐
        ──> dense ──> ranking of DEPTH passages ──┴── sum of 1 / (constant + rank) ──> top k

BM25 knows names that an encoder has never seen, an encoder knows words that mean the same. Their scores have different scales, their ranks
do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.search.local.bm25 import Bm25Index, Hits
from igpo_megatron.search.local.dense import DenseClient, DenseIndex, embedding_of, open_dense
from igpo_megatron.search.settings import Search

DEPTH = 100
"""Passages of each ranking that are fused; more if more are asked for."""


def fuse(rankings: Sequence[Sequence[Passage]], constant: int) -> list[tuple[Passage, float]]:
    """Reciprocal rank fusion: score(d) = sum over the rankings that hold d of 1 / (constant + rank of d), with ranks from 1.

    Best first; of equal scores the passage of the earlier ranking comes first, within a ranking the better one. A passage that a ranking
    holds twice counts once.

    Source: Cormack, Clarke, Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods", SIGIR 2009,
    with constant = 60.
    """
    scores: dict[Passage, float] = {}
    for ranking in rankings:
        for rank, passage in enumerate(dict.fromkeys(ranking), start=1):
            scores[passage] = scores.get(passage, 0.0) + 1 / (constant + rank)
    return sorted(scores.items(), key=lambda found: -found[1])


class HybridIndex:
    """Both indexes of the same passages, asked at the same time. Safe to use from several threads."""

    def __init__(self, bm25: Bm25Index, dense: DenseIndex, constant: int):
        self._bm25, self._dense, self._constant = bm25, dense, constant
        self._beside = ThreadPoolExecutor(thread_name_prefix="hybrid-bm25")

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """Per query the `k` best (passage, fused score). Raises what either index raises: half an answer would be a weaker one."""
        depth = max(k, DEPTH)
        by_words = self._beside.submit(lambda: [self._bm25.search(query, depth) for query in queries])
        by_meaning = self._dense.search(queries, depth)
        pairs = zip(by_words.result(), by_meaning, strict=True)
        return [tuple(fuse([[passage for passage, _ in hits] for hits in pair], self._constant)[:k]) for pair in pairs]


class HybridClient(DenseClient):
    """SearchClient over a `HybridIndex`."""

    provider = "hybrid"
    decides = (*DenseClient.decides, "rrf_constant")

    @classmethod
    def open(cls, config: Search) -> HybridClient:
        """Read and index `search.corpus` both ways. UserError if something is missing."""
        assert config.corpus is not None
        passages = tuple(read_corpus(config.corpus))
        dense = open_dense(passages, embedding_of(config), config.vectors)
        return cls(HybridIndex(Bm25Index(passages), dense, config.rrf_constant), config.top_k)
