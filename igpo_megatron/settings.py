"""What every section of the settings is, and how a setting names a function of the user's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from igpo_megatron.types import UserError

HOOK = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""`package.module:name`, which names something that Python can import."""

HOOK_RULE = Field(pattern=HOOK)
HookName = Annotated[str, HOOK_RULE]
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


def load_hook(key: str, name: str) -> Any:
    """What setting `key` names as `package.module:name`. Raises UserError where it cannot be imported or called."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}={name} cannot be imported ({why}); expected package.module:function, installed or in PYTHONPATH") from error
    if not callable(found):
        raise UserError(f"{key}={name} is a {type(found).__name__}; expected a function")
    return found
