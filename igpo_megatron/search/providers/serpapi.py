"""Google by serpapi.com, read as Search-R1's proxy reads it: answer box, organic results, related questions.

GET ?engine=google&q -> answer_box, organic_results[] of {title, link, snippet}, related_questions[] of {question, link, snippet}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign
from igpo_megatron.search.providers.web import WebApi, items, passage


class SerpApi(WebApi):
    provider = "serpapi"
    key_variable = "SERPAPI_API_KEY"
    official = "https://serpapi.com/search"
    signs = (Sign("quota", "run out of searches|searches for the month"), Sign("key", "invalid api key"))

    def ask(self, query: str) -> Request:
        params = {"engine": "google", "q": query, "gl": self.country, "hl": self.language, "num": str(self.top_k)}
        return Request("GET", self.url, {**params, "api_key": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        # "Google hasn't returned any results" comes as an `error` of a search whose status is Success.
        organic = items(answer, "organic_results", echo=lambda a: _status(a) == "Success")
        related = items(answer, "related_questions", echo=lambda a: True)
        box = answer.get("answer_box")
        found = [passage(box, "snippet", "answer")] if isinstance(box, dict) and (box.get("snippet") or box.get("answer")) else []
        found += [passage(item, "snippet") for item in organic]
        return found + [passage(item, "snippet", title="question") for item in related]


def _status(answer: Mapping[str, Any]) -> Any:
    metadata = answer.get("search_metadata")
    return metadata.get("status") if isinstance(metadata, dict) else None
