"""Dense retrieval over a corpus in memory: exact inner product of normalised embeddings.

passages --prefix, encode, normalise--> vectors [N, D] ── FAISS flat index, or numpy ──> top k

sentence-transformers is required for encoding; FAISS is optional and faster. Neither is installed by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from igpo_megatron.data.corpus import Passage, join_contents, read_corpus
from igpo_megatron.search.local.bm25 import CorpusClient, some_passages
from igpo_megatron.search.results import SearchResult
from igpo_megatron.search.settings import Search
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

Vectors = NDArray[np.float32]
"""[N, D], rows of length 1."""

NOT_INSTALLED = (
    "search.backend=dense needs sentence-transformers, which is not installed; install igpo-megatron[dense] (sentence-transformers and "
    "faiss-cpu)"
)


class Encoder(Protocol):
    """Texts to vectors."""

    def __call__(self, texts: list[str]) -> NDArray[Any]:
        """[len(texts), D], of any length and float type."""
        ...


def sentence_transformer(name: str) -> Encoder:
    """The encoder of a sentence-transformers model. UserError where the library or the model is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(NOT_INSTALLED) from None
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise UserError(f"search.encoder={name} cannot be loaded: {error}") from None
    return lambda texts: model.encode(texts, batch_size=256, show_progress_bar=len(texts) > 10_000)


class DenseIndex:
    """The passages nearest to a query. Safe to use from several threads."""

    def __init__(
        self,
        passages: Iterable[Passage],
        encode: Encoder,
        *,
        query_prefix: str,
        passage_prefix: str,
        vectors: Path | None = None,
        encoder: str = "",
    ):
        """`vectors`: file of the embeddings by the encoder named `encoder`.

        UserError if there is nothing to index, or the file belongs to another encoder or other passages.
        """
        self.passages = some_passages(passages)
        self._encode = encode
        self._query_prefix = query_prefix
        self._encoding = threading.Lock()
        texts = [passage_prefix + join_contents(passage) for passage in self.passages]
        self.vectors = unit_rows(encode(texts)) if vectors is None else _kept(vectors, encoder, texts, encode)
        self._nearest = _faiss(self.vectors) or _numpy(self.vectors)

    def search(self, queries: Sequence[str], k: int) -> list[tuple[tuple[Passage, float], ...]]:
        """Per query the `k` best (passage, cosine), best first; none for a query without words, which also has nearest passages."""
        asked = [query for query in queries if query.strip()]
        if not asked:
            return [()] * len(queries)
        with self._encoding:  # encoders are not thread-safe
            vectors = unit_rows(self._encode([self._query_prefix + query for query in asked]))
        scores, rows = self._nearest(vectors, min(k, len(self.passages)))
        found = {
            query: tuple((self.passages[row], float(score)) for row, score in zip(best, values, strict=True))
            for query, best, values in zip(asked, rows, scores, strict=True)
        }
        return [found.get(query, ()) for query in queries]


def unit_rows(vectors: NDArray[Any]) -> Vectors:
    """Rows scaled to length 1; a row of zeros stays."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _numpy(vectors: Vectors) -> Any:
    def nearest(asked: Vectors, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
        scores = asked @ vectors.T  # [Q, N]
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, rows, axis=1), rows

    return nearest


def _faiss(vectors: Vectors) -> Any:
    """The same by FAISS; None if it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index.search


def _kept(path: Path, encoder: str, texts: list[str], encode: Encoder) -> Vectors:
    """The vectors in a file, computed and written if it is missing. UserError if they belong to another encoder or other texts."""
    digest = hashlib.blake2b("\0".join([encoder, *texts]).encode(), digest_size=16).hexdigest()
    if not path.is_file():
        vectors = unit_rows(encode(texts))
        with whole(path) as part, part.open("wb") as file:  # to a name numpy would add a suffix
            np.savez(file, vectors=vectors, digest=np.array(digest))
        return vectors
    with np.load(path) as kept:
        if str(kept["digest"]) != digest:
            raise UserError(f"search.vectors={path} belongs to another corpus, encoder or passage_prefix; remove it, or name another file")
        return kept["vectors"]


class DenseClient(CorpusClient):
    """SearchClient over a `DenseIndex`."""

    provider = "dense"
    decides = ("corpus", "encoder", "query_prefix", "passage_prefix", "top_k")
    needs = (*CorpusClient.needs, ("encoder", ", a sentence-transformers model such as intfloat/e5-base-v2"))

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """Missing settings, and a missing library. A replay encodes nothing."""
        yield from super().problems(search)
        if search.mode != "replay" and find_spec("sentence_transformers") is None:
            yield NOT_INSTALLED

    @classmethod
    def open(cls, config: Search) -> DenseClient:
        """Load the encoder, read and embed `search.corpus`. UserError if something is missing."""
        assert config.corpus is not None and config.encoder is not None
        index = DenseIndex(
            read_corpus(config.corpus),
            sentence_transformer(config.encoder),
            query_prefix=config.query_prefix,
            passage_prefix=config.passage_prefix,
            vectors=config.vectors,
            encoder=config.encoder,
        )
        return cls(index, config.top_k)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query: the nearest passages, at any distance. A query without words is `empty`."""
        start = time.perf_counter()
        found = await asyncio.to_thread(self.index.search, queries, self.top_k)
        took = time.perf_counter() - start
        hits = ([passage for passage, _ in best] for best in found)
        return [SearchResult.answered(query, self.provider, best, took) for query, best in zip(queries, hits, strict=True)]
