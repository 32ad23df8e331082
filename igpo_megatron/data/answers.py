"""Read answers from the forms in which data sets store them. Every reader of questions uses this.

    None                             no answer
    "Rhine"                          one answer, never its letters
    '["Rhine", "the Rhine"]'         JSON text of a string, a list or an object: its value
    ["Rhine", "the Rhine"]           each; an item that is JSON text of a list of strings is read as that list
    {"target": ["Rhine"]}            Search-R1's, SQuAD's {"text": [...]}, TriviaQA's {"Value": ..., "Aliases": [...]}

Values that could be one answer or several, or are not text, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from igpo_megatron.data.problems import shown
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

MAIN = ("target", "value", "text")
"""Names of an object's main answers, in any letter case; the first that exists counts."""

ALIASES = ("aliases", "humananswers")
"""Names of further answers. Normalised copies are ignored: they are the same answers, spelled worse."""

_PYTHON = re.compile(r"""(\[\s*['"].*\]|\{\s*'.*\}|array\(\[.*\).*)""", re.DOTALL)
"""`str(["a", 'b'])`, `str({"target": ["a"]})` and `repr` of a NumPy array, which are not JSON."""


class NotAnswers(ValueError):
    """The value does not hold answers; the message says what was found and what was expected."""


def as_answers(value: Any) -> tuple[str, ...]:
    """Every answer in `value`, in order, empty strings included. Raises NotAnswers."""
    if value is None:
        return ()
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, Mapping):
        return _of_object(value)
    if not isinstance(value, list | tuple):
        raise NotAnswers(f"found {shown(value)}, expected a string or a list of strings")
    for answer in value:
        if not isinstance(answer, str):
            raise NotAnswers(f"found the answer {shown(answer)}, expected a string")
    return tuple(part for answer in value for part in _listed(answer))


def _of_text(text: str) -> tuple[str, ...]:
    stripped = text.strip()
    if stripped[:1] not in ('"', "[", "{") and not stripped.startswith("array(["):
        return (text,)
    try:
        value = json_loads_untrusted(stripped)
    except BadJson:
        if _PYTHON.fullmatch(stripped):
            found = f"found the text of a Python list or dict, {shown(stripped)}"
            raise NotAnswers(f"{found}; write it as JSON or as a list of strings") from None
        return (text,)
    if isinstance(value, list) and value and not any(isinstance(item, str) for item in value):
        if len(value) == 1 and isinstance(value[0], int | float):
            return (text,)  # a number in brackets, e.g. [1984], is a plain answer
        raise NotAnswers(f"found {shown(text)}, which may be one answer or several; write a list of strings")
    return as_answers(value)


def _listed(answer: str) -> tuple[str, ...]:
    """The answers in one item of a list: the item itself, or, for JSON text of a list of strings, which is never an answer, its items."""
    if not answer.lstrip().startswith("["):
        return (answer,)
    try:
        value = json_loads_untrusted(answer.strip())
    except BadJson:
        return (answer,)
    return tuple(value) if value and all(isinstance(item, str) for item in value) else (answer,)


def _of_object(value: Mapping[str, Any]) -> tuple[str, ...]:
    fields = {str(name).lower(): field for name, field in value.items()}
    main = next((name for name in MAIN if name in fields), None)
    if main is None:
        raise NotAnswers(f"found an object with {', '.join(map(str, value)) or 'no fields'}; expected one of {', '.join(MAIN)} in it")
    given = [fields.get(name) for name in (main, *ALIASES)]
    if nested := [field for field in given if isinstance(field, Mapping)]:
        raise NotAnswers(f"found {shown(nested[0])} inside an object, expected a string or a list of strings")
    return tuple(answer for field in given for answer in as_answers(field))
