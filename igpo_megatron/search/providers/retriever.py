"""A server that speaks Search-R1's protocol.

    POST url {"queries": [str, ...], "topk": int, "return_scores": true}
    200 {"result": [[hit, ...], ...]}      one list per query; hit = {"document": {"id", "contents"}, "score"} or {"id", "contents"}

Search-R1's own retrieval server, its reranker and its proxies for web APIs, and `igpo serve retriever` are such servers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from igpo_megatron.data.corpus import Passage, split_contents
from igpo_megatron.search.http import HttpBackend
from igpo_megatron.search.providers.base import Passages, Request, Unreadable, bearer
from igpo_megatron.search.settings import Search


@dataclass(frozen=True, kw_only=True)
class Retriever(HttpBackend):
    """Sends all queries of a search in one request."""

    return_scores: bool = True
    """Both forms of answer are read. Search-R1's stock server fails if scores are not requested."""

    provider = "retriever"
    decides = ("url", "top_k")

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """The address is missing or invalid."""
        if not (search.url or "").startswith(("http://", "https://")):
            yield f"search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve; found {search.url!r}"

    def request(self, queries: Sequence[str]) -> Request:
        body = {"queries": list(queries), "topk": self.top_k, "return_scores": self.return_scores}
        return Request("POST", self.url, headers=bearer(self.key), body=body)

    def read(self, answer: Any, num_queries: int) -> list[Passages]:
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
