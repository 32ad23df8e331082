"""The one door for text and JSON that a policy, a page, a peer or a file has written: nothing behind it raises on them.

bytes or text ──json_loads_untrusted──> plain values whose depth, numbers and strings are bounded, or BadJson
text ───────────clean_text────────────> text that every tokenizer, file and page can hold
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 64
"""Containers in each other. What tools and policies write in earnest has fewer than ten."""

MAX_DIGITS = 300
"""Digits of an integer; with these it is still a finite float."""


class BadJson(ValueError):
    """What is wrong with the text, in a few words that fit behind "not JSON: "."""


def json_loads_untrusted(text: str | bytes) -> Any:
    """`text` as JSON, cleaned by `clean_text`; a byte order mark is passed over. Raises BadJson, and nothing else."""
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text.removeprefix("\ufeff"), parse_int=_integer, parse_float=_number, parse_constant=_constant)
        return _bounded(value, 0)
    except BadJson:
        raise
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BadJson(f"nested deeper than {MAX_DEPTH} levels") from None


def clean_text(text: str) -> str:
    """`text` without zero characters and with U+FFFD for halves of surrogate pairs, which no UTF-8 file can hold."""
    if text.isascii():
        return text.replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def _bounded(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if not isinstance(value, (list, dict)):
        return value
    if depth == MAX_DEPTH:
        raise BadJson(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_bounded(item, depth + 1) for item in value]
    return {clean_text(key): _bounded(item, depth + 1) for key, item in value.items()}


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BadJson(f"a number of {len(digits):,} digits")
    return int(digits)


def _number(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise BadJson(f"a number beyond floating point, {digits[:20]}")
    return number


def _constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is no number")
