"""Rows of a TSV, as DPR publishes its passages: quotes around a field are optional, and a quoted field may run over lines.

A quote that never closes is an ordinary character: it must not swallow the following rows.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

from igpo_megatron.data.json_rows import BOM
from igpo_megatron.data.problems import Problem

DPR_COLUMNS = ["id", "text", "title"]

MOST_LINES = 100
"""A quoted field runs over at most this many lines."""

_FIELD_LIMIT = 2**31 - 1
"""Replaces the csv module's own limit, which some articles exceed."""


class _Lines:
    """Lines of a stream without their ends, some of which can be put back. Raises UnicodeDecodeError."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._lines = (line.decode("utf-8").rstrip("\r\n").removeprefix(BOM) for line in stream)
        self._waiting: deque[str] = deque()

    def next(self) -> str | None:
        """The next line; None after the last."""
        return self._waiting.popleft() if self._waiting else next(self._lines, None)

    def next_row(self) -> str | None:
        """As `next`, but skips blank lines."""
        while (line := self.next()) is not None and not line.strip():
            pass
        return line

    def put_back(self, lines: list[str]) -> None:
        self._waiting.extendleft(reversed(lines))


def read_table(stream: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
    """(row, record or Problem) by the names in the first line; without such a line, DPR's id, text, title. Raises UnicodeDecodeError."""
    csv.field_size_limit(_FIELD_LIMIT)
    lines, row = _Lines(stream), 0
    first = lines.next_row()
    if first is None:
        return
    names = _fields(first) or first.split("\t")
    if names[0].isdigit():
        names = DPR_COLUMNS
        lines.put_back([first])
    if repeated := [name for name in names if names.count(name) > 1]:
        yield 0, Problem("the column occurs twice; keep one", column=repeated[0])
        return
    while (line := lines.next_row()) is not None:
        fields = _row(line, len(names), lines)
        if len(fields) == len(names):
            yield row, dict(zip(names, fields, strict=True))
        else:
            yield row, Problem(f"found {len(fields)} fields, expected {len(names)} ({', '.join(names)})", row)
        row += 1


def _row(line: str, width: int, lines: _Lines) -> list[str]:
    """Fields of the row that begins with `line`."""
    if (fields := _fields(line)) is not None:
        return fields
    joined, looked_at = line, list[str]()
    while len(looked_at) < MOST_LINES and (more := lines.next()) is not None:
        looked_at.append(more)
        joined += "\n" + more
        fields = _fields(joined) if '"' in more else None
        if fields is not None and len(fields) == width:
            return fields
        whole = _fields(more)
        if whole is not None and len(whole) == width:
            break  # a row of its own: the quote does not extend to it
    lines.put_back(looked_at)
    return line.split("\t")


def _fields(line: str) -> list[str] | None:
    """Fields of a complete row; None if a quote is open at its end, or closes in the middle of a field."""
    if '"' not in line:
        return line.split("\t")
    try:
        (fields,) = csv.reader([line], delimiter="\t", strict=True)
    except (csv.Error, ValueError):
        return None
    return fields
