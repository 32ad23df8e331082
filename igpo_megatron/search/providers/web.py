"""Shared code of all web search APIs. Each other file here is one provider: its request, and where its passages are.

A result's snippet becomes a passage's text (its title if there is no snippet), its address the passage's id.
"""

from __future__ import annotations

import html
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.http import HttpBackend
from igpo_megatron.search.providers.base import Passages, Request, Secret, Unreadable


@dataclass(frozen=True, kw_only=True)
class WebApi(HttpBackend):
    """One query per request, with a key, a country and a language."""

    key: Secret
    country: str
    """Two letters, lower case."""

    language: str

    batch = 1
    decides: ClassVar[tuple[str, ...]] = ("country", "language", "top_k")
    most_chars: ClassVar[int] = 2048
    """Longer queries are cut: a refusal would count as the provider's failure, though the policy caused it."""

    def request(self, queries: Sequence[str]) -> Request:
        """The request for the only query."""
        (query,) = queries
        return self.ask(cut(query, self.most_chars))

    def read(self, answer: Any, num_queries: int) -> list[Passages]:
        """The passages of the only query, `top_k` at most."""
        found = self.passages(answer)
        useful = [passage for passage in found if passage.text]
        if found and not useful:
            raise Unreadable(f"expected results with a text; none of {len(found)} has one")
        return [tuple(useful[: self.top_k])]

    @abstractmethod
    def ask(self, query: str) -> Request:
        """The request for a query that is not too long."""

    @abstractmethod
    def passages(self, answer: Any) -> list[Passage]:
        """Every passage of a decoded body. Raises Unreadable."""


OTHER = object()
"""Marks a path that leads into something that is not an object, which differs from an absent key."""


def items(answer: Any, *path: str, echo: Callable[[Mapping[str, Any]], bool] = lambda answer: False) -> list[dict[str, Any]]:
    """The list of objects at `path`; [] if it is absent and `echo` recognises the body as an answer. Raises Unreadable."""
    found = answer
    for key in path:
        found = found.get(key) if isinstance(found, dict) else OTHER
        if found is None and echo(answer):
            return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Unreadable(f"expected a list of objects at {'.'.join(path)}")
    return found


def passage(item: Mapping[str, Any], *texts: str, title: str = "title", link: str = "link") -> Passage:
    """A result as a passage; its text is the first named field that is not empty, else the title."""
    name = _text(item, title)
    return Passage(_text(item, link), name, next((text for key in texts if (text := _text(item, key))), name))


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
