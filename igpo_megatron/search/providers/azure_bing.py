"""The format of Bing Web Search v7. Microsoft retired the service in August 2025; other servers still speak it.

GET ?q&mkt&count -> webPages.value[] of {name, url, snippet}
"""

from __future__ import annotations

from typing import Any

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign
from igpo_megatron.search.providers.web import WebApi, items, passage


class AzureBing(WebApi):
    provider = "azure_bing"
    key_variable = "AZURE_BING_API_KEY"
    needs = (("url", ": Microsoft retired Bing Search v7; name a server that speaks its format"),)
    most_results = 50
    official = None
    signs = (Sign("quota", "out of call volume quota"),)

    def ask(self, query: str) -> Request:
        params = {"q": query, "mkt": f"{self.language}-{self.country.upper()}", "count": str(self.top_k)}
        return Request("GET", self.url, params, {"Ocp-Apim-Subscription-Key": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "webPages", "value", echo=lambda a: a.get("_type") == "SearchResponse")
        return [passage(item, "snippet", title="name", link="url") for item in found]
