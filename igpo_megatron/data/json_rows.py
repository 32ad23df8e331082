"""Read records of JSON files: a bad number or a repeated field is a flaw of its record, and the next record is read all the same."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from igpo_megatron.data.problems import Problem
from igpo_megatron.untrusted import MAX_DIGITS

Records = Iterator[tuple[int, dict[str, Any] | Problem]]
"""(row counted from 0, record or what is wrong with it). A Problem without a row ends the file."""

CHUNK = 2**16
_LIST = re.compile(r"\s*(?:\{\s*\"data\"\s*:\s*)?\[", re.IGNORECASE)
"""A list, or an object whose first value is one under the name `Data`, as in TriviaQA's files."""

_BETWEEN = re.compile(r"[\s,]*")

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


def read_json(stream: Any, may_be_list: bool) -> Records:
    """Records of JSON lines, or of one list where there may be one. Raises UnicodeDecodeError."""
    # Only a .json is looked into: it may be either, and a .jsonl's first line may be megabytes long.
    if may_be_list and _LIST.match(stream.peek(CHUNK)[:CHUNK].decode("utf-8-sig", errors="replace")):
        return _list(stream)
    return _lines(stream)


def _lines(stream: IO[bytes]) -> Records:
    row, decoder = 0, RecordDecoder()
    for line in stream:
        if not line.strip():
            continue
        record: Any
        try:
            record = decoder.loads(line)
        except UnicodeDecodeError as error:
            record = Problem(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)", row)
        except json.JSONDecodeError as error:
            record = Problem(f"not JSON ({error.msg} at column {error.colno}): {line[:60].decode(errors='replace').strip()!r}", row)
        except Flaw as flaw:
            record = Problem(str(flaw), row, flaw.column)
        yield row, _object(record, row)
        row += 1


def _list(stream: IO[bytes]) -> Records:
    """The objects of a JSON list, decoded one by one."""
    decoder, characters = RecordDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text = characters.decode(stream.read(CHUNK))
    start = _LIST.match(text)
    assert start is not None, "the caller has looked"
    position, row, size = start.end(), 0, CHUNK
    while True:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        record: Any
        try:
            if text.startswith("]", position):
                return
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
            more = stream.read(size) if cut else b""
            if not more:
                where = text[position : position + 60]
                yield row, Problem(f"not JSON, or cut off, in record {row} ({error.msg}): {where!r}; fetch the file again")
                return
            # Twice as much each time: a long record is not decoded from its start again and again.
            text, position, size = text[position:] + characters.decode(more), 0, 2 * size
            continue
        try:
            decoder.check(record)
        except Flaw as flaw:
            record = Problem(str(flaw), row, flaw.column)
        yield row, _object(record, row)
        row, size = row + 1, CHUNK


def _object(record: Any, row: int) -> dict[str, Any] | Problem:
    if isinstance(record, dict | Problem):
        return record
    return Problem(f"found a JSON {type(record).__name__}, expected an object", row)
