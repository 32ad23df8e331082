"""api.search.brave.com: GET ?q&count -> web.results[] of {title, url, description}."""

from __future__ import annotations

from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign
from igpo_megatron.search.providers.web import WebApi, items, passage, plain


class Brave(WebApi):
    provider = "brave"
    key_variable = "BRAVE_API_KEY"
    most_results = 20
    official = "https://api.search.brave.com/res/v1/web/search"
    signs = (Sign("key", "SUBSCRIPTION_TOKEN_INVALID"), Sign("quota", "QUOTA_LIMITED|USAGE_LIMIT_EXCEEDED"))
    most_chars = 400

    def ask(self, query: str) -> Request:
        few_words = " ".join(query.split()[:50])  # Brave limits words as well as characters
        params = {"q": few_words, "count": str(self.top_k), "country": self.country.upper(), "search_lang": self.language}
        return Request("GET", self.url, {**params, "text_decorations": "false"}, {"X-Subscription-Token": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "web", "results", echo=lambda a: a.get("type") == "search")
        return [passage({**item, "plain": plain(item.get("description"))}, "plain", link="url") for item in found]
