"""What every section of the settings is, and how a setting names a function of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from igpo_megatron.types import UserError

HOOK = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""`package.module:name`, which names something that Python can import."""

HOOK_RULE = Field(pattern=HOOK)
HookName = Annotated[str, HOOK_RULE]


def _auto_or_positive(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise ValueError("expected auto or a number of at least 1")


Threads = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_positive)]
"""How many threads a process has; `auto` is replaced where it starts (policy/parallel.py)."""

OURS, HOOKED = "ours", "package.module:function"
"""Tags of what `ours_or_hooked` chooses between."""


class Section(BaseModel):
    """Base of every section: immutable, strict about names, documented by the strings under its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def problems(self) -> Iterator[str]:
        """What is wrong among the section's own settings, before a run starts: what was found, what was expected, what to change."""
        yield from ()


class Hooked(Section):
    """Settings of something that a run takes from the user's own package."""

    name: str = Field(pattern=HOOK)
    """`package.module:function`, importable where the run starts."""

    options: dict[str, Any] = {}
    """Whatever the function wants to know; it is not looked at."""


def is_hook(name: str) -> bool:
    """Whether a name is `package.module:name` rather than one of ours."""
    return re.match(HOOK, name) is not None


def ours_or_hooked(value: Any) -> str:
    """Whether a name, or the section that has it, is one of ours or a hook: `OURS` or `HOOKED`."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", value)
    return HOOKED if isinstance(name, str) and is_hook(name) else OURS


def one_of(sections: Iterable[type[Section]]) -> Any:
    """The type of a section that is one of these, chosen by its `name`."""
    return Annotated[reduce(or_, sections), Field(discriminator="name")]


def ours_or(hooked: Any, ours: Any) -> Any:
    """The type of a setting whose name, or that of its section, is a hook or one of ours: type `hooked` or `ours`."""
    return Annotated[Annotated[ours, Tag(OURS)] | Annotated[hooked, Tag(HOOKED)], Discriminator(ours_or_hooked)]


def unknown(key: str, name: str, known: Iterable[str]) -> str:
    """What to say of a name that is neither one of ours nor a hook."""
    near = difflib.get_close_matches(name, known := list(known), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key}={name!r}: expected one of {', '.join(known)}, or package.module:function{hint}"


def lacks(thing: Any, methods: Iterable[str]) -> list[str]:
    """Which of these an object, or a class, does not have as `async def`."""
    return [method for method in methods if not inspect.iscoroutinefunction(getattr(thing, method, None))]


def load_hook(key: str, name: str, value: type | None = None) -> Any:
    """What setting `key` names as `package.module:name`: a function or class or, where `value` is given, an instance of that.

    Raises UserError where it cannot be imported, or is something else.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}={name} cannot be imported ({why}); expected package.module:function, installed or in PYTHONPATH") from error
    if not callable(found) and not (value and isinstance(found, value)):
        raise UserError(f"{key}={name} is a {type(found).__name__}; expected a function" + (f" or a {value.__name__}" if value else ""))
    return found
