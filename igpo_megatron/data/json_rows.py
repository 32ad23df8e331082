"""Decode records of JSON files: a bad number or a repeated field is a flaw of its record, and the next record is read all the same."""

from __future__ import annotations

import json
from typing import Any

from igpo_megatron.untrusted import MAX_DIGITS

BOM = "\ufeff"
"""Byte order mark, which some programs write before the first character."""


class Flaw(ValueError):
    """A record that must not be used; `column` is the field at fault, if one is."""

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.column = column


class _LongNumber:
    """Stands for an integer that is too long to be one."""

    def __repr__(self) -> str:
        return f"a number of more than {MAX_DIGITS} digits"


class RecordDecoder:
    """`json.loads` that raises json.JSONDecodeError where the text is no JSON, Flaw where it is and must not be used, and nothing else."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(parse_int=self._integer, object_pairs_hook=self._object)
        self._long: list[int] = []
        self._repeated: list[str] = []

    def loads(self, line: bytes | str) -> Any:
        """One line, with or without a byte order mark. Also raises UnicodeDecodeError."""
        text = line if isinstance(line, str) else line.decode("utf-8")
        text = text.strip().removeprefix(BOM).lstrip()
        value, end = self.raw_decode(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        self.check(value)
        return value

    def raw_decode(self, text: str, start: int) -> tuple[Any, int]:
        """(value, where it ends); its flaws are kept for `check`, so that the reader knows where the next record begins."""
        self._long, self._repeated = [], []
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, start) from None

    def check(self, record: Any) -> None:
        """Raises Flaw for what was wrong with the value decoded last."""
        if self._long:
            column = next((name for name, field in record.items() if _holds_long(field)), None) if isinstance(record, dict) else None
            raise Flaw(f"found a number of {self._long[0]:,} digits, expected at most {MAX_DIGITS}; write it as a string", column)
        if self._repeated:
            raise Flaw("the field is there twice in one object; keep one", self._repeated[0])

    def _integer(self, digits: str) -> Any:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        self._long.append(len(digits.lstrip("-")))
        return _LongNumber()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self._repeated.append(next(name for name in names if names.count(name) > 1))
        return found


def _holds_long(value: Any) -> bool:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, _LongNumber):
            return True
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return False
