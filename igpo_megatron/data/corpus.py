"""Read a corpus of JSON lines into passages.

Two line formats are understood and may be mixed:

    {"id": "country:IR", "title": "Iran", "text": "Iran is a country in Asia."}     this project's
    {"id": "17", "contents": "\\"Iran\\"\\nIran is a country in Asia."}                 Search-R1's (wiki-18)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpo_megatron.data.json_rows import RecordDecoder, read_line
from igpo_megatron.data.problems import Problem, shown
from igpo_megatron.types import UserError


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text."""

    doc_id: str
    """Identifier within its corpus; the address for a web result."""

    title: str
    text: str


def read_corpus(path: Path | str) -> Iterator[Passage]:
    """Yield every passage of a JSON-lines file; blank lines are skipped.

    Raises UserError, with file and line, if the file is missing, a line is not a JSON object, or fields are missing or not strings.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such corpus file; expected JSON lines of {{id, title, text}} or {{id, contents}}")
    with path.open("rb") as lines:
        decoder = RecordDecoder()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse(line, f"{path}:{number}", decoder)


def _parse(line: bytes, place: str, decoder: RecordDecoder) -> Passage:
    """One line -> Passage. `place` is `file:line` for the error."""
    record = read_line(line, decoder)
    if isinstance(record, Problem):
        field = f"field {record.column!r}: " if record.column else ""
        raise UserError(f"{place}: {field}{record.message}; a line holds id, title and text, or id and contents")
    if isinstance(record.get("id"), int):
        record["id"] = str(record["id"])
    if "contents" in record:
        title, text = split_contents(_string(record, "contents", place))
    else:
        title, text = _string(record, "title", place), _string(record, "text", place)
    return Passage(_string(record, "id", place), title, text)


def _string(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        fields = ", ".join(record) or "none"
        raise UserError(f"{place}: field {field!r} is missing (found {fields}); expected id, title and text, or id and contents")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} is {'null' if value is None else shown(value)}, expected a string")
    return value


def split_contents(contents: str) -> tuple[str, str]:
    """Search-R1 `"Title"\\nbody` -> (title, body); contents of one line have no title."""
    first, newline, body = contents.partition("\n")
    return (first.strip().strip('"'), body) if newline else ("", contents)


def join_contents(passage: Passage) -> str:
    """Passage -> Search-R1 `"Title"\\nbody`, the inverse of `split_contents`."""
    return f'"{passage.title}"\n{passage.text}'
