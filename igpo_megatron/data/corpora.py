"""Write a corpus of any size as JSON lines {id, title, text}, from the published formats.

JSON lines {id, contents} (wiki-18)   ┐
DPR's TSV (id, text, title)           ├──records──> Passage | Problem, one at a time ──> callers
parquet of either                     ┘
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igpo_megatron.data.corpus import Passage, split_contents
from igpo_megatron.data.problems import Problem, shown
from igpo_megatron.data.records import good_records

IDS = ("id", "_id", "docid")


@dataclass(slots=True)
class CorpusCount:
    """What was in one file of passages."""

    path: Path
    passages: int = 0
    problems: list[Problem] = field(default_factory=list)


def read_passages(count: CorpusCount, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[Passage]:
    """The valid passages of a file, one at a time; problems with the others are added to `count`."""
    for row, record in good_records(count.path, count.problems, on_bytes):
        found = to_passage(record, row)
        if isinstance(found, Problem):
            count.problems.append(found)
        else:
            count.passages += 1
            yield found
    if not count.passages and not count.problems:
        count.problems.append(Problem("the file has no records; expected at least one passage"))


def to_passage(record: Mapping[str, Any], row: int) -> Passage | Problem:
    """One record: an id (`id`, `_id` or `docid`), and `contents` or `text`, with or without a `title`."""
    name = next((name for name in IDS if name in record), None)
    body = next((name for name in ("contents", "text") if name in record), None)
    if name is None or body is None:
        found = ", ".join(record) or "none"
        return Problem(f"found the fields {found}; expected id and contents, or id, title and text", row, "id" if name is None else "text")
    doc_id, text, title = record[name], record[body], record.get("title")
    if isinstance(doc_id, bool) or not isinstance(doc_id, str | int) or doc_id == "":
        return Problem(f"found {shown(doc_id)}, expected a string or a number", row, name)
    if not isinstance(text, str) or not text.strip():
        return Problem(f"found {shown(text)}, expected text", row, body)
    if title is not None and not isinstance(title, str):
        return Problem(f"found {shown(title)}, expected a string", row, "title")
    if body == "contents" and title is None:
        title, text = split_contents(text)
    return Passage(str(doc_id), title or "", text)


def write_passages(passages: Iterator[Passage], path: Path) -> Iterator[Passage]:
    """Write passages as JSON lines of {id, title, text}, and yield each after writing it."""
    with path.open("w", encoding="utf-8") as file:
        for passage in passages:
            file.write(json.dumps({"id": passage.doc_id, "title": passage.title, "text": passage.text}) + "\n")
            yield passage


def total_bytes(paths: Sequence[Path]) -> int:
    """Size of all files together, for a progress bar; missing ones count as empty."""
    return sum(path.stat().st_size for path in paths if path.is_file())
