"""Web search APIs. Each class is one provider: the request for a query, and where the passages are in the answer.

A result's snippet becomes a passage's text (its title where it has none), its address the passage's id.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self
from urllib.parse import urlencode

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.providers.base import Passages, Request, Secret, Sign, Unreadable
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError


@dataclass(frozen=True, kw_only=True)
class WebApi:
    """What all of them share: one query per request, a key, a country, a language."""

    url: str
    key: Secret
    top_k: int
    country: str
    """Two letters, lower case."""

    language: str

    provider: ClassVar[str]
    official: ClassVar[str | None]
    """The provider's own address; None where it has none any more."""

    signs: ClassVar[tuple[Sign, ...]] = ()
    batch: ClassVar[int] = 1
    most_chars: ClassVar[int] = 2048
    """A longer query is cut: it would be refused, and that is the policy's doing, not the provider's."""

    @classmethod
    def from_config(cls, config: Search) -> Self:
        """UserError where the key's variable or the address is missing."""
        url, key = config.url or cls.official, Secret.from_config(config)
        assert key is not None, f"{cls.provider} has a row in KEY_VARIABLES"
        if url is None:
            raise UserError(f"search.backend={config.backend} needs search.url: its own service no longer exists")
        return cls(url=url, key=key, top_k=config.top_k, country=config.country, language=config.language, **cls._own(config))

    @classmethod
    def _own(cls, config: Search) -> dict[str, Any]:
        """Fields of this provider alone."""
        return {}

    def request(self, queries: Sequence[str]) -> Request:
        """The request for the only query."""
        (query,) = queries
        return self.ask(cut(query, self.most_chars))

    def read(self, answer: Any, num_queries: int) -> list[Passages]:
        """The passages of the only query, `top_k` at most."""
        found = self.passages(answer)
        told = [passage for passage in found if passage.text]
        if found and not told:
            raise Unreadable(f"expected results with a text; none of {len(found)} has one")
        return [tuple(told[: self.top_k])]

    def ask(self, query: str) -> Request:
        """The request for a query that is not too long."""
        raise NotImplementedError

    def passages(self, answer: Any) -> list[Passage]:
        """Every passage of a decoded body. Raises Unreadable."""
        raise NotImplementedError


class Serper(WebApi):
    """Google by serper.dev: POST {q, num, gl, hl} -> organic[] of {title, link, snippet}."""

    provider = "serper"
    official = "https://google.serper.dev/search"
    signs = (Sign("quota", "not enough credits"),)

    def ask(self, query: str) -> Request:
        body = {"q": query, "num": self.top_k, "gl": self.country, "hl": self.language}
        return Request("POST", self.url, headers={"X-API-KEY": self.key.value}, body=body)

    def passages(self, answer: Any) -> list[Passage]:
        # A body without `organic` is an empty answer only if it repeats the question; the published code took refusals for one.
        return [passage(item, "snippet") for item in items(answer, "organic", echo=lambda a: "searchParameters" in a)]


@dataclass(frozen=True, kw_only=True)
class BrightData(WebApi):
    """Bing by Bright Data's SERP API: POST {zone, url of the result page, format: raw} -> organic[] of {title, link, description}."""

    zone: str

    provider = "brightdata"
    official = "https://api.brightdata.com/request"
    signs = (
        Sign("key", status=407),
        Sign("key", "zone.{0,80}(not found|not exist|disabled)|invalid (api )?(token|credentials)"),
        Sign("quota", "account.{0,20}suspended|(insufficient|negative|not enough).{0,20}(balance|funds|credits)"),
    )

    @classmethod
    def _own(cls, config: Search) -> dict[str, Any]:
        if config.zone is None:
            raise UserError("search.backend=brightdata needs search.zone, the name of your SERP zone")
        return {"zone": config.zone}

    def ask(self, query: str) -> Request:
        page = {
            "q": query,
            "mkt": f"{self.language}-{self.country.upper()}",
            "setLang": self.language,
            "cc": self.country,
            "brd_json": "1",
        }
        body = {"zone": self.zone, "url": f"https://www.bing.com/search?{urlencode(page)}", "format": "raw"}
        return Request("POST", self.url, headers=bearer(self.key), body=body)

    def passages(self, answer: Any) -> list[Passage]:
        return [passage(item, "description") for item in items(answer, "organic", echo=lambda a: "general" in a)]


class AzureBing(WebApi):
    """Bing Web Search v7, the format alone, since Microsoft retired the service in August 2025.

    GET ?q&mkt&count -> webPages.value[] of {name, url, snippet}
    """

    provider = "azure_bing"
    official = None
    signs = (Sign("quota", "out of call volume quota"),)

    def ask(self, query: str) -> Request:
        params = {"q": query, "mkt": f"{self.language}-{self.country.upper()}", "count": str(self.top_k)}
        return Request("GET", self.url, params, {"Ocp-Apim-Subscription-Key": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "webPages", "value", echo=lambda a: a.get("_type") == "SearchResponse")
        return [passage(item, "snippet", title="name", link="url") for item in found]


class SerpApi(WebApi):
    """Google by serpapi.com, read as Search-R1's proxy reads it: answer box, organic results, related questions.

    GET ?engine=google&q -> answer_box, organic_results[] of {title, link, snippet}, related_questions[] of {question, link, snippet}
    """

    provider = "serpapi"
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


@dataclass(frozen=True, kw_only=True)
class GoogleCse(WebApi):
    """Google's Custom Search JSON API, read as Search-R1's proxy does in snippet mode: pieces of more than five words.

    GET ?key&cx&q&num -> items[] of {title, link, snippet}
    """

    engine_id: str

    provider = "google_cse"
    official = "https://www.googleapis.com/customsearch/v1"
    signs = (
        Sign("key", "API_KEY_INVALID|API key not valid|keyInvalid"),
        # Before the next: the daily quota is refused with rateLimitExceeded as well.
        Sign("quota", "queries per day|dailyLimitExceeded"),
        Sign("limited", "rateLimitExceeded|RATE_LIMIT_EXCEEDED"),
    )

    @classmethod
    def _own(cls, config: Search) -> dict[str, Any]:
        if config.engine_id is None:
            raise UserError("search.backend=google_cse needs search.engine_id, the cx of your programmable search engine")
        return {"engine_id": config.engine_id}

    def ask(self, query: str) -> Request:
        params = {"q": query, "cx": self.engine_id, "num": str(self.top_k), "gl": self.country, "hl": self.language}
        return Request("GET", self.url, {**params, "key": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "items", echo=lambda a: a.get("kind") == "customsearch#search")
        return [passage({**item, "pieces": _long_pieces(item.get("snippet"))}, "pieces", "snippet") for item in found]


def _long_pieces(snippet: Any) -> str:
    """The parts between the dots of a snippet that are more than a few stray words."""
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|…", snippet)] if isinstance(snippet, str) else []
    return " ".join(piece for piece in pieces if len(piece.split()) > 5)


class Tavily(WebApi):
    """tavily.com: POST {query, max_results} -> results[] of {title, url, content}."""

    provider = "tavily"
    official = "https://api.tavily.com/search"
    signs = (Sign("quota", status=432), Sign("quota", status=433))
    most_chars = 400

    def ask(self, query: str) -> Request:
        return Request("POST", self.url, headers=bearer(self.key), body={"query": query, "max_results": self.top_k})

    def passages(self, answer: Any) -> list[Passage]:
        return [passage(item, "content", link="url") for item in items(answer, "results")]


class Brave(WebApi):
    """api.search.brave.com: GET ?q&count -> web.results[] of {title, url, description}."""

    provider = "brave"
    official = "https://api.search.brave.com/res/v1/web/search"
    signs = (Sign("key", "SUBSCRIPTION_TOKEN_INVALID"), Sign("quota", "QUOTA_LIMITED|USAGE_LIMIT_EXCEEDED"))
    most_chars = 400

    def ask(self, query: str) -> Request:
        few_words = " ".join(query.split()[:50])  # Brave's limit, beside that on characters
        params = {"q": few_words, "count": str(self.top_k), "country": self.country.upper(), "search_lang": self.language}
        return Request("GET", self.url, {**params, "text_decorations": "false"}, {"X-Subscription-Token": self.key.value})

    def passages(self, answer: Any) -> list[Passage]:
        found = items(answer, "web", "results", echo=lambda a: a.get("type") == "search")
        return [passage({**item, "plain": plain(item.get("description"))}, "plain", link="url") for item in found]


WEB_APIS: dict[str, type[WebApi]] = {api.provider: api for api in (Serper, BrightData, AzureBing, SerpApi, GoogleCse, Tavily, Brave)}
"""`search.backend` -> provider."""


OTHER = object()
"""Stands for what is inside something that has no inside, which is not the same as absent."""


def items(answer: Any, *path: str, echo: Callable[[Mapping[str, Any]], bool] = lambda answer: False) -> list[dict[str, Any]]:
    """The list of objects at `path`; [] where it is absent from a body that `echo` knows for an answer. Raises Unreadable."""
    found = answer
    for key in path:
        found = found.get(key) if isinstance(found, dict) else OTHER
        if found is None and echo(answer):
            return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Unreadable(f"expected a list of objects at {'.'.join(path)}")
    return found


def passage(item: Mapping[str, Any], *texts: str, title: str = "title", link: str = "link") -> Passage:
    """A result as a passage; its text is the first of the named fields that says something, else the title."""
    name = _text(item, title)
    said = next((text for key in texts if (text := _text(item, key))), name)
    return Passage(_text(item, link), name, said)


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    return value.strip() if isinstance(value, str) else ""


def plain(text: Any) -> str:
    """Text without HTML tags and entities."""
    return html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)) if isinstance(text, str) else ""


def cut(query: str, most: int) -> str:
    """At most `most` characters, whole words if there are any."""
    if len(query) <= most:
        return query
    return query[:most].rpartition(" ")[0] or query[:most]


def bearer(key: Secret) -> dict[str, str]:
    """The usual header of a token."""
    return {"Authorization": f"Bearer {key.value}"}
