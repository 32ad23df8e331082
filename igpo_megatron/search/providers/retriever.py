"""A server that speaks Search-R1's protocol.

    POST url {"queries": [str, ...], "topk": int, "return_scores": true}
    200 {"result": [[hit, ...], ...]}      one list per query; hit = {"document": {"id", "contents"}, "score"} or {"id", "contents"}

Search-R1's own retrieval server, its reranker and its proxies for web APIs, and `igpo serve retriever` are such servers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from igpo_megatron.data.corpus import Passage, split_contents
from igpo_megatron.search.providers.base import Passages, Request, Secret, Sign, Unreadable
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """Back-end of all queries of a search in one request."""

    url: str
    top_k: int
    key: Secret | None = None
    return_scores: bool = True
    """Either form of answer is read. Search-R1's stock server breaks when asked for none."""

    provider: ClassVar[str] = "retriever"
    batch: ClassVar[None] = None
    signs: ClassVar[tuple[Sign, ...]] = ()

    @classmethod
    def from_config(cls, config: Search) -> Retriever:
        """UserError where the address or the key's environment variable is missing."""
        if config.url is None:
            raise UserError("search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve")
        return cls(url=config.url, top_k=config.top_k, key=Secret.from_config(config))

    def request(self, queries: Sequence[str]) -> Request:
        """One request for all queries."""
        headers = {"Authorization": f"Bearer {self.key.value}"} if self.key else {}
        body = {"queries": list(queries), "topk": self.top_k, "return_scores": self.return_scores}
        return Request("POST", self.url, headers=headers, body=body)

    def read(self, answer: Any, num_queries: int) -> list[Passages]:
        """Passages per query, at most `top_k` each. Raises Unreadable where the answer has another shape."""
        lists = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(lists, list) or len(lists) != num_queries or not all(isinstance(hits, list) for hits in lists):
            raise Unreadable(f'expected {{"result": [...]}} with {num_queries} lists')
        return [tuple(_passage(hit) for hit in hits[: self.top_k]) for hits in lists]


def _passage(hit: Any) -> Passage:
    """A hit with or without a score; some servers give a document as bare text, or without an id."""
    document = hit["document"] if isinstance(hit, dict) and "document" in hit else hit
    if isinstance(document, str):
        document = {"contents": document}
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str):
        raise Unreadable(f"expected a document with contents instead of {json.dumps(hit)[:80]}")
    title, text = split_contents(contents)
    return Passage(str(document["id"]) if "id" in document else "", title, text)
