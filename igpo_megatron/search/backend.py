"""What every search back-end says of itself; registry.py has them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from igpo_megatron.search.results import SearchClient
from igpo_megatron.search.settings import Search
from igpo_megatron.types import UserError


class SearchBackend(ABC):
    """One way to search: facts, and how it is opened."""

    provider: ClassVar[str]
    """Its name, as in `search.backend`."""

    decides: ClassVar[tuple[str, ...]]
    """Settings of section `search` that decide an answer: one stored under others is not used."""

    needs: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(setting that must be given, how the sentence "search.backend=NAME needs search.SETTING" goes on)."""

    key_variable: ClassVar[str | None] = None
    """Environment variable of its key, unless `search.api_key_env` names another; None where it needs none."""

    most_results: ClassVar[int | None] = None
    """Results that it gives per query at most; None where there is no limit of its own."""

    in_process: ClassVar[bool] = False
    """It searches in this process, so limits of requests and attempts do not concern it."""

    @classmethod
    def missing(cls, search: Search) -> Iterator[str]:
        """What it needs and was not given."""
        for setting, what in cls.needs:
            if getattr(search, setting) is None:
                yield f"search.backend={cls.provider} needs search.{setting}{what}"

    @classmethod
    def problems(cls, search: Search) -> Iterator[str]:
        """All that can be seen to be wrong before it is opened."""
        yield from cls.missing(search)

    @classmethod
    @abstractmethod
    def open(cls, search: Search) -> SearchClient:
        """Ready for use. Raises UserError where its settings, its key or its files are wrong."""


def require(backend: type[SearchBackend], search: Search) -> None:
    """UserError with the first setting that is missing."""
    for problem in backend.missing(search):
        raise UserError(problem)
