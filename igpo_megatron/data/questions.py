"""Write question sets into one parquet file in the published IGPO layout: every question once, with ids independent of the order.

files ──records, layouts──> Question | Problem ──once per question, not among the excluded──> FILE.part ──> FILE
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igpo_megatron.data.answers import NotAnswers, as_answers
from igpo_megatron.data.layouts import igpo_truth
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.qa_sets import QaLayout, Question, Unusable, recognise, source_of, split_of
from igpo_megatron.data.question_files import read_prompts
from igpo_megatron.data.records import good_records, read_records
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

ROWS = 4096
"""Rows written at once."""


@dataclass(slots=True)
class FileCount:
    """What was in one file of questions."""

    path: Path
    layout: str = "unknown"
    source: str = ""
    split: str = ""
    written: int = 0
    repeated: int = 0
    """Already present in this file or another, in any letter case."""

    excluded: int = 0
    without_answer: int = 0
    """By the set's design: Natural Questions without a short answer, MuSiQue's unanswerable ones."""

    problems: list[Problem] = field(default_factory=list)


class Refused(UserError):
    """Nothing was written because of problems, or because no question was left."""


def convert(
    paths: Sequence[Path],
    out: Path,
    *,
    source: str | None = None,
    split: str | None = None,
    aliases: Path | None = None,
    exclude: Sequence[Path] = (),
    skip_problems: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[FileCount]:
    """Read `paths` and write `out`; one count per file. `source` and `split`: needed if file names do not give them.

    `aliases`: 2WikiMultihopQA's id_aliases.json. `exclude`: parquet files whose questions are left out, e.g. the test set.
    Raises Refused, with the counts as its second argument, if there are problems that may not be skipped, or no questions.
    """
    counts = [FileCount(path) for path in paths]
    known = {_key(prompt.question) for path in exclude for prompt in read_prompts(path)}
    seen: set[bytes] = set()
    names: set[str] = set()
    others = _read_aliases(aliases) if aliases else {}
    schema = igpo_schema()
    with whole(out) as part, pq.ParquetWriter(part, schema) as writer:
        rows: list[dict[str, Any]] = []
        for count in counts:
            for question in _questions(count, source, split, others, on_bytes):
                key = _key(question.text)
                if key in known:
                    count.excluded += 1
                elif key in seen:
                    count.repeated += 1
                else:
                    seen.add(key)
                    count.written += 1
                    rows.append(_row(question, count, names))
                    if len(rows) == ROWS:
                        writer.write_table(pa.Table.from_pylist(rows, schema))
                        rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
        if not any(count.written for count in counts) or (not skip_problems and any(count.problems for count in counts)):
            raise Refused("nothing was written", counts)
    return counts


def _questions(
    count: FileCount, source: str | None, split: str | None, aliases: Mapping[str, list[str]], on_bytes: Callable[[int], None]
) -> Iterator[Question]:
    """The questions of a file; all other records are counted in `count`."""
    count.source, count.split = source or "", split or split_of(count.path) or ""
    layout: QaLayout | None = None
    for row, record in good_records(count.path, count.problems, on_bytes):
        if layout is None:
            layout = recognise(record)
            count.problems += _file_problems(count, layout, record)
            if layout is None:
                return
            count.layout = layout.name
        try:
            question = layout.read(record, aliases)
        except Unusable as wrong:
            count.problems.append(Problem(str(wrong), row, wrong.column))
            continue
        if question is None:
            count.without_answer += 1
        else:
            yield question
    if layout is None and not count.problems:
        count.problems.append(Problem("the file has no records; expected at least one question"))


def _file_problems(count: FileCount, layout: QaLayout | None, record: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of the complete file; also sets its source."""
    if layout is None:
        found = ", ".join(record) or "no fields"
        yield Problem(f"found a record with {found}; expected the fields question and answer (or answers), or those of a published set")
        return
    count.source = count.source or layout.source or source_of(count.path) or ""
    if not count.source:
        yield Problem(f"the name of the set is neither in the file nor in its path ({layout.name} layout); give it with --source")
    if not count.split:
        yield Problem("neither the file's name nor its folder's says train, dev or test; give it with --split")


def _row(question: Question, count: FileCount, names: set[str]) -> dict[str, Any]:
    digest = _key(question.text).hex()[:16]
    own = (question.own_id or digest).removeprefix(f"{count.split}_")
    name = f"{count.source}-{count.split}-{own}"
    if name in names:  # ids repeat in merged files
        name = f"{name}-{digest}"
    names.add(name)
    return igpo_row(count.source, question.text, question.answers, index=name, split=count.split)


def igpo_schema(*extra: str) -> pa.Schema:
    """The published IGPO layout, with `extra` text fields in `extra_info`."""
    return pa.schema(
        {
            "data_source": pa.string(),
            "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
            "ability": pa.string(),
            "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
            "extra_info": pa.struct({name: pa.string() for name in ("index", "split", *extra)}),
        }
    )


def igpo_row(source: str, question: str, answers: Sequence[str], **extra: str) -> dict[str, Any]:
    """One question in that layout; `extra`: the fields of `extra_info`."""
    return {
        "data_source": source,
        "prompt": [{"content": question, "role": "user"}],
        "ability": "search & question answering",
        "reward_model": {"ground_truth": igpo_truth(answers), "style": "unknown"},
        "extra_info": extra,
    }


def _key(question: str) -> bytes:
    """The same for questions that differ only in letter case, spaces, or a final question mark, which some copies drop."""
    return hashlib.blake2b(" ".join(question.casefold().split()).rstrip(" ?").encode(), digest_size=16).digest()


def _read_aliases(path: Path) -> dict[str, list[str]]:
    """2WikiMultihopQA's JSON lines {Q_id, aliases, demonyms} -> names of each entity."""
    found: dict[str, list[str]] = {}
    # JSON lines, in spite of the file's name.
    for row, record in read_records(path):
        if isinstance(record, Problem) or "Q_id" not in record or "aliases" not in record:
            raise UserError(f"{path}: {record if isinstance(record, Problem) else Problem('expected Q_id and aliases', row)}")
        try:
            found[str(record["Q_id"])] = [*as_answers(record["aliases"]), *as_answers(record.get("demonyms"))]
        except NotAnswers as wrong:
            raise UserError(f"{path}: {Problem(str(wrong), row, 'aliases')}") from None
    return found
