"""Google's Custom Search JSON API, read as Search-R1's proxy does in snippet mode: pieces of more than five words.

GET ?key&cx&q&num -> items[] of {title, link, snippet}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign
from igpo_megatron.search.providers.web import WebApi, items, passage


@dataclass(frozen=True, kw_only=True)
class GoogleCse(WebApi):
    engine_id: str

    provider = "google_cse"
    key_variable = "GOOGLE_API_KEY"
    needs = (("engine_id", ", the cx of your programmable search engine"),)
    decides = ("engine_id", "country", "language", "top_k")
    most_results = 10
    official = "https://www.googleapis.com/customsearch/v1"
    signs = (
        Sign("key", "API_KEY_INVALID|API key not valid|keyInvalid"),
        # Must come first: a used-up daily quota is refused with rateLimitExceeded as well.
        Sign("quota", "queries per day|dailyLimitExceeded"),
        Sign("limited", "rateLimitExceeded|RATE_LIMIT_EXCEEDED"),
    )

    def ask(self, query: str) -> Request:
        params = {"q": query, "cx": self.engine_id, "num": str(self.top_k), "gl": self.country, "hl": self.language}
        return Request("GET", self.url, {**params, "key": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "items", echo=lambda a: a.get("kind") == "customsearch#search")
        return [passage({**item, "pieces": _long_pieces(item.get("snippet"))}, "pieces", "snippet") for item in found]


def _long_pieces(snippet: Any) -> str:
    """The parts of a snippet between ellipses that have more than five words."""
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|…", snippet)] if isinstance(snippet, str) else []
    return " ".join(piece for piece in pieces if len(piece.split()) > 5)
