"""The data that providers exchange with the HTTP client: requests, passages, keys and signs of refusal.

queries --request--> Request ──(http.py)──> decoded JSON --read--> passages per query
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from igpo_megatron.data.corpus import Passage
from igpo_megatron.supervision.blotting import blot_value

Passages = tuple[Passage, ...]
"""Of one query, best first."""


class Unreadable(ValueError):
    """An answer that does not have the provider's format; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A key and where it came from. Only the latter may be shown."""

    variable: str
    """Environment variable."""

    value: str = field(repr=False)

    @classmethod
    def read(cls, variable: str | None) -> Secret | None:
        """The key in an environment variable, which is set; None without a variable."""
        return cls(variable, os.environ[variable].strip()) if variable else None


def blot(text: str, key: Secret | None) -> str:
    """The text without the key, in any form in which it is sent."""
    return text if key is None else blot_value(text, key.value)


def bearer(key: Secret | None) -> dict[str, str]:
    """The usual header of a token; none without a key."""
    return {} if key is None else {"Authorization": f"Bearer {key.value}"}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. Headers and parameters may contain the key, so they are never shown."""

    method: Literal["GET", "POST"]
    url: str
    params: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Any = field(default=None, repr=False)
    """Sent as JSON; None sends no body."""


Meaning = Literal["key", "quota", "limited"]
"""The key is refused; the quota is used up; the rate is too high. The first two stop the run."""


@dataclass(frozen=True, slots=True)
class Sign:
    """How to recognise one provider's refusal if the HTTP status is not enough."""

    meaning: Meaning
    words: str = ""
    """Regular expression, searched for in the body without regard to case."""

    status: int | None = None
    """HTTP status; None for any."""

    def fits(self, status: int, body: str) -> bool:
        """True if a response is this refusal."""
        return self.status in (None, status) and re.search(self.words, body, re.IGNORECASE) is not None
