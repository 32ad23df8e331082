"""What a search provider is to the HTTP engine: a request to build, an answer to read, refusals to recognise.

queries --request--> Request ──(http.py)──> decoded JSON --read--> passages per query
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.settings import Search
from igpo_megatron.supervision.blotting import blot_value
from igpo_megatron.types import UserError

Passages = tuple[Passage, ...]
"""Of one query, best first."""


class Unreadable(ValueError):
    """An answer of another shape than the provider's protocol; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A key and where it came from. Only the latter may be shown."""

    variable: str
    """Environment variable."""

    value: str = field(repr=False)

    @classmethod
    def from_config(cls, config: Search, usual: str | None) -> Secret | None:
        """The back-end's key, in the variable `usual` unless the settings name one; None where it needs none.

        Raises UserError where its variable is not set.
        """
        variable = config.api_key_env or usual
        if variable is None:
            return None
        value = os.environ.get(variable, "").strip()
        if not value:
            where = f"search.api_key_env={variable}" if config.api_key_env else f"search.backend={config.backend} needs {variable}"
            raise UserError(f"{where}: that environment variable is not set; export it")
        return cls(variable, value)


def blot(text: str, key: Secret | None) -> str:
    """Text without the key, in any of the forms it is sent in."""
    return text if key is None else blot_value(text, key.value)


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. Never shown as a whole: headers and parameters may hold the key."""

    method: Literal["GET", "POST"]
    url: str
    params: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Any = field(default=None, repr=False)
    """Sent as JSON; None sends no body."""


Meaning = Literal["key", "quota", "limited"]
"""The key is refused; nothing is left to spend; slower, please. The first two stop the run."""


@dataclass(frozen=True, slots=True)
class Sign:
    """How one provider's refusal is told apart where the HTTP status alone does not say it."""

    meaning: Meaning
    words: str = ""
    """Regular expression, searched for in the body without regard to case."""

    status: int | None = None
    """HTTP status; None for any."""

    def fits(self, status: int, body: str) -> bool:
        """True if this refusal is meant."""
        return self.status in (None, status) and re.search(self.words, body, re.IGNORECASE) is not None
