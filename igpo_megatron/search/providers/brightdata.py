"""Bing by Bright Data's SERP API: POST {zone, url of the result page, format: raw} -> organic[] of {title, link, description}."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Request, Sign, bearer
from igpo_megatron.search.providers.web import WebApi, items, passage


@dataclass(frozen=True, kw_only=True)
class BrightData(WebApi):
    zone: str

    provider = "brightdata"
    key_variable = "BRIGHTDATA_API_KEY"
    needs = (("zone", ", the name of your SERP zone"),)
    official = "https://api.brightdata.com/request"
    signs = (
        Sign("key", status=407),
        Sign("key", "zone.{0,80}(not found|not exist|disabled)|invalid (api )?(token|credentials)"),
        Sign("quota", "account.{0,20}suspended|(insufficient|negative|not enough).{0,20}(balance|funds|credits)"),
    )

    def ask(self, query: str) -> Request:
        market = f"{self.language}-{self.country.upper()}"
        page = {"q": query, "mkt": market, "setLang": self.language, "cc": self.country, "brd_json": "1"}
        body = {"zone": self.zone, "url": f"https://www.bing.com/search?{urlencode(page)}", "format": "raw"}
        return Request("POST", self.url, headers=bearer(self.key), body=body)

    def passages(self, answer: Any) -> list[Passage]:
        return [passage(item, "description") for item in items(answer, "organic", echo=lambda a: "general" in a)]
