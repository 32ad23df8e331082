"""tavily.com: POST {query, max_results} -> results[] of {title, url, content}."""

from __future__ import annotations

from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign, bearer
from igpo_megatron.search.providers.web import WebApi, items, passage


class Tavily(WebApi):
    provider = "tavily"
    key_variable = "TAVILY_API_KEY"
    decides = ("top_k",)
    most_results = 20
    official = "https://api.tavily.com/search"
    signs = (Sign("quota", status=432), Sign("quota", status=433))
    most_chars = 400

    def ask(self, query: str) -> Request:
        return Request("POST", self.url, headers=bearer(self.key), body={"query": query, "max_results": self.top_k})

    def passages(self, answer: Any) -> list[Passage]:
        return [passage(item, "content", link="url") for item in items(answer, "results")]
