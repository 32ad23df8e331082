"""Read records of JSON files: a record with a bad number or a repeated field is reported, and reading continues with the next."""

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
"""Start of a list, or of an object whose first field is a list named `Data`, as in TriviaQA's files."""

_BETWEEN = re.compile(r"[\s,]*")

BOM = "\ufeff"
"""Byte order mark, which some programs put at the start of a file."""


class Flaw(ValueError):
    """A record that must not be used; `column` is the field at fault, if one is."""

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.column = column


class _LongNumber:
    """Placeholder for an integer with too many digits."""

    def __repr__(self) -> str:
        return f"a number of more than {MAX_DIGITS} digits"


class RecordDecoder:
    """`json.loads` that raises only json.JSONDecodeError, for text that is not JSON, and Flaw, for JSON that must not be used."""

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
        """(value, where it ends). Flaws are kept for `check`, so that the reader can continue after a flawed record."""
        self._long, self._repeated = [], []
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, start) from None

    def check(self, record: Any) -> None:
        """Raises Flaw if the value decoded last has one."""
        if self._long:
            column = next((name for name, field in record.items() if _holds_long(field)), None) if isinstance(record, dict) else None
            raise Flaw(f"found a number of {self._long[0]:,} digits, expected at most {MAX_DIGITS}; write it as a string", column)
        if self._repeated:
            raise Flaw("the field occurs twice in one object; keep one", self._repeated[0])

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
    """Records of JSON lines, or of one list if `may_be_list`. Raises UnicodeDecodeError."""
    # Only a .json file is examined: it may be either, while the first line of a .jsonl file may be megabytes long.
    if may_be_list and _LIST.match(stream.peek(CHUNK)[:CHUNK].decode("utf-8-sig", errors="replace")):
        return _list(stream)
    return _lines(stream)


def _lines(stream: IO[bytes]) -> Records:
    decoder = RecordDecoder()
    for row, line in enumerate(line for line in stream if line.strip()):
        yield row, read_line(line, decoder, row)


def read_line(line: bytes, decoder: RecordDecoder, row: int | None = None) -> dict[str, Any] | Problem:
    """The object in one line, or what is wrong with it."""
    try:
        return _object(decoder.loads(line), row)
    except UnicodeDecodeError as error:
        return Problem(f"not UTF-8 text ({error.reason} at byte {error.start} of the line); save the file as UTF-8", row)
    except json.JSONDecodeError as error:
        start = line[:60].decode(errors="replace").strip()
        return Problem(f"not JSON ({error.msg} at column {error.colno}); found {start!r}, expected one object per line", row)
    except Flaw as flaw:
        return Problem(str(flaw), row, flaw.column)


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
                yield row, Problem(f"not JSON, or cut off, in record {row} ({error.msg}): {where!r}; download the file again")
                return
            # The size doubles each time, so that a long record is decoded from its start only a few times.
            text, position, size = text[position:] + characters.decode(more), 0, 2 * size
            continue
        try:
            decoder.check(record)
        except Flaw as flaw:
            record = Problem(str(flaw), row, flaw.column)
        yield row, _object(record, row)
        row, size = row + 1, CHUNK


def _object(record: Any, row: int | None) -> dict[str, Any] | Problem:
    if isinstance(record, dict | Problem):
        return record
    return Problem(f"found a JSON {type(record).__name__}, expected an object", row)
