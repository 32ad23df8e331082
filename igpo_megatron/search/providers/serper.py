"""Google by serper.dev: POST {q, num, gl, hl} -> organic[] of {title, link, snippet}."""

from __future__ import annotations

from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign
from igpo_megatron.search.providers.web import WebApi, items, passage


class Serper(WebApi):
    provider = "serper"
    key_variable = "SERPER_API_KEY"
    official = "https://google.serper.dev/search"
    signs = (Sign("quota", "not enough credits"),)

    def ask(self, query: str) -> Request:
        body = {"q": query, "num": self.top_k, "gl": self.country, "hl": self.language}
        return Request("POST", self.url, headers={"X-API-KEY": self.key.value}, body=body)

    def passages(self, answer: Any) -> list[Passage]:
        # A body without `organic` is an empty answer only if it repeats the question; the published code took refusals for one.
        return [passage(item, "snippet") for item in items(answer, "organic", echo=lambda a: "searchParameters" in a)]
