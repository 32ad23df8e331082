"""The base class of every search back-end; registry.py lists them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from igpo_megatron.search.results import SearchClient
from igpo_megatron.search.settings import Search


class SearchBackend(ABC):
    """One way to search: its facts, and how to open it."""

    provider: ClassVar[str]
    """Its name in `search.backend`."""

    decides: ClassVar[tuple[str, ...]]
    """Settings of section `search` that affect an answer. Answers stored under other values of them are not used."""

    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(required setting, the end of the sentence "search.backend=NAME needs search.SETTING")."""

    key_variable: ClassVar[str | None] = None
    """Environment variable of its key, unless `search.api_key_env` names another; None if it needs no key."""

    most_results: ClassVar[int | None] = None
    """Largest number of results per query; None if the back-end sets no limit."""

    in_process: ClassVar[bool] = False
    """It searches in this process, so limits on requests and attempts do not apply."""

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """Everything that can be found wrong before the back-end is opened: one sentence per required setting that is missing, and more."""
        for setting, what in cls.needs:
            if getattr(search, setting) is None:
                yield f"search.backend={cls.provider} needs search.{setting}{what}"

    @classmethod
    @abstractmethod
    def open(cls, search: Search) -> SearchClient:
        """A client ready for use; `registry.open_backend` has checked the settings. Raises UserError if its files are wrong."""
