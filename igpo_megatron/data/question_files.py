"""Read questions from parquet.

    parquet -> rows -> layout (named, or recognised by the rows) -> Prompt or Problem, row by row

A broken \\boxed, as in ARPO's files, is repaired with a warning. A question that no answer could score is left out with a warning.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igpo_megatron.algorithms.outcomes import normal_form
from igpo_megatron.data.answers import NotAnswers
from igpo_megatron.data.layouts import (
    ALIAS_SEPARATOR,
    LAYOUTS,
    Ambiguous,
    Layout,
    LayoutName,
    Row,
    as_mapping,
    ground_truth,
    own_question,
    recognise,
)
from igpo_megatron.data.problems import Problem, shown
from igpo_megatron.data.records import python_rows, repeated_fields
from igpo_megatron.types import Prompt, UserError

logger = logging.getLogger(__name__)

BROKEN_BOX, BOX = "\boxed", "\\boxed"
"""ARPO's published files hold a backspace and `oxed` where \\boxed was meant."""

SHOWN_PROBLEMS = 10
"""Problems that an error lists; `igpo data check` lists all."""

HEAD_ROWS = 256
"""Rows that `unusable` reads."""

BATCH_ROWS = 65_536

USED = ("data_source", "prompt", "reward_model", "extra_info", "question")
"""Columns that are read."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything found in one file."""

    path: Path
    layout: str | None
    """IGPO, ARPO or Search-R1; None if it cannot be determined."""

    questions: list[Prompt]
    """What a run would use, in row order."""

    problems: tuple[Problem, ...]
    """In row order; rows that a problem costs are not in `questions`."""

    @property
    def sources(self) -> Counter[str]:
        """Usable rows per source."""
        return Counter(prompt.source for prompt in self.questions)


def read_prompts(path: Path | str, layout: LayoutName = "auto", outcome: str = "f1") -> list[Prompt]:
    """All questions of a parquet file, in row order. Raises UserError with file, row and column of every problem.

    `outcome`: the `reward.outcome` that scores them; rows that it cannot score are left out, which is logged.
    """
    report = check_file(path, layout, outcome)
    if refusal := _refusal(report.path, report.problems):
        raise UserError(refusal)
    if left_out := [problem for problem in report.problems if problem.costs == "row"]:
        count = len(left_out) + len(report.questions)
        notice = f"{path}: {len(left_out)} of {count} questions are left out; the first: {left_out[0]}"
        if not report.questions:
            raise UserError(notice)
        logger.warning("%s", notice)
    return report.questions


def check_file(
    path: Path | str,
    layout: LayoutName = "auto",
    outcome: str = "f1",
    too_long: Callable[[Prompt], str | None] = lambda prompt: None,
) -> Report:
    """Check a parquet file of questions; its contents never raise. `too_long`: why a question does not fit the context, or None."""
    path = Path(path)
    rows, problems = _read(path)
    found, questions = None, list[Prompt]()
    if rows:
        found, prompts, problems = _inspect(_with_boxes(rows, path), layout, outcome)
        for row, prompt in prompts:
            if (reason := too_long(prompt)) is None:
                questions.append(prompt)
            else:
                problems.append(Problem(reason, row, "prompt", "row"))
    problems.sort(key=lambda problem: -1 if problem.row is None else problem.row)
    return Report(path, found.name if found else None, questions, tuple(problems))


def unusable(path: Path) -> str | None:
    """The error of `read_prompts` for a file's columns, their types and its first HEAD_ROWS rows, which are all that is read; None if these
    are sound."""
    rows, problems = _read(path, HEAD_ROWS)
    return _refusal(path, [*problems, *(problem for number, row in enumerate(rows) for problem in _bad(row, number))])


def _refusal(path: Path, problems: Sequence[Problem]) -> str | None:
    """Why a file cannot be used; None if no problem costs all of it."""
    listed = [f"  - {problem}" for problem in problems if problem.costs == "file"]
    if len(listed) > SHOWN_PROBLEMS:
        listed[SHOWN_PROBLEMS:] = [f"  - and {len(listed) - SHOWN_PROBLEMS} more; `igpo data check {path}` lists all"]
    return "\n".join([f"{path}: cannot be used as questions:", *listed]) if listed else None


def _read(path: Path, most: int | None = None) -> tuple[list[Row | Problem], list[Problem]]:
    """The rows of a file, or only the first `most`; and, if there are none, why."""
    if not path.is_file():
        return [], [Problem("no such file; expected a parquet file of questions")]
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        return [], [Problem(f"not a parquet file ({why}); `igpo data prepare` makes one of JSON lines or a tsv")]
    if problems := [Problem(message, column=column) for column, message in _schema_problems(schema)]:
        return [], problems
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(most or BATCH_ROWS, columns=[name for name in USED if name in schema.names])
            values = [value for batch in islice(batches, 1 if most else None) for value in python_rows(batch)]
    except (pa.ArrowException, OSError) as error:
        return [], [Problem(f"the parquet file is damaged ({str(error).splitlines()[0]})")]
    rows = [_row(value, number) for number, value in enumerate(values)]
    return rows, [] if rows else [Problem("the file has no rows; expected at least one question")]


def read_extra(path: Path, key: str) -> dict[str, Any]:
    """`extra_info[key]` of every readable row that has it, by the id of the row's question."""
    rows, _ = _read(path)
    pairs = zip(_ids(rows), rows, strict=True)
    return {own_id: row["extra_info"][key] for own_id, row in pairs if isinstance(row, dict) and row["extra_info"].get(key) is not None}


Found = tuple[Layout | None, list[tuple[int, Prompt]], list[Problem]]
"""Layout, row and question of everything usable, problems."""


def _inspect(rows: Sequence[Row | Problem], name: LayoutName, outcome: str) -> Found:
    bad = {number: list(_bad(row, number)) for number, row in enumerate(rows)}
    try:
        good = [row for number, row in enumerate(rows) if isinstance(row, dict) and not bad[number]]
        layout = recognise(good) if name == "auto" else LAYOUTS[name]
    except Ambiguous as error:
        return None, [], [Problem(str(error)), *chain.from_iterable(bad.values())]
    questions = []
    for number, (row, own_id) in enumerate(zip(rows, _ids(rows), strict=True)):
        problems = bad[number]
        if isinstance(row, dict):
            # A row without exactly one user message has no question to check, but its answers are still checked.
            if not any(problem.column == "prompt" for problem in problems):
                problems += _question_problems(row, number, layout)
            answers, wrong = _answers(row, number, layout, outcome)
            problems += wrong
            if all(problem.costs == "answer" for problem in problems):
                questions.append((number, Prompt(own_id, layout.question(row), answers, row["data_source"])))
    return layout, questions, list(chain.from_iterable(bad.values()))


# ---- columns


_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_large_list_view)


def _is_string(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in _STRINGS)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in _LISTS)


def _is_strings(kind: pa.DataType) -> bool:
    return _is_string(kind) or (_is_list(kind) and _is_string(kind.value_type))


def _struct_field(kind: pa.DataType, name: str) -> pa.DataType | None:
    """Type of a struct's field; None if `kind` is not a struct or lacks the field."""
    return kind.field(name).type if pa.types.is_struct(kind) and kind.get_field_index(name) >= 0 else None


def _is_messages(kind: pa.DataType) -> bool:
    fields = [_struct_field(kind.value_type, name) for name in ("role", "content")] if _is_list(kind) else [None]
    return all(field is not None and _is_string(field) for field in fields)


def _is_mapping(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or pa.types.is_map(kind) or _is_string(kind) or pa.types.is_null(kind)


def _schema_problems(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """(column, message) for every column that no layout can read."""
    used = pa.schema([field for field in schema if field.name in USED])
    if repeated := repeated_fields(used):
        yield from ((name, "it occurs twice; keep one") for name in repeated)
        return
    expected: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        "data_source": ("string", _is_string),
        "prompt": ("list of structs with role and content", _is_messages),
        "reward_model": ("struct with ground_truth", lambda kind: _is_mapping(kind) and not _lacks_truth(kind)),
    }
    for column, (description, fits) in expected.items():
        if column not in used.names:
            yield column, f"column is missing (found {', '.join(schema.names) or 'none'}); expected {description}"
        elif not fits(used.field(column).type):
            yield column, f"found type {used.field(column).type}, expected {description}"
    if "extra_info" in used.names and not _is_mapping(found := used.field("extra_info").type):
        description = "a struct, a map or the JSON text of an object; drop the column if it is not needed"
        yield "extra_info", f"found type {found}, expected {description}"
    truth = _struct_field(used.field("reward_model").type, "ground_truth") if "reward_model" in used.names else None
    if truth is not None and not _is_truth(truth):
        description = "a string (IGPO, ARPO), a list of strings, or a struct with a list of strings `target` (Search-R1)"
        yield "reward_model.ground_truth", f"found type {truth}, expected {description}"


def _lacks_truth(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and _struct_field(kind, "ground_truth") is None


def _is_truth(kind: pa.DataType) -> bool:
    target = _struct_field(kind, "target")
    return _is_strings(kind) or (target is not None and _is_strings(target))


# ---- rows


def _row(values: dict[str, Any] | Problem, number: int) -> Row | Problem:
    """A row of plain values, with structs, maps and JSON texts as dicts."""
    if isinstance(values, Problem):
        return replace(values, row=number)
    row = {"extra_info": None, **values}
    for column in ("reward_model", "extra_info"):
        try:
            row[column] = as_mapping(row[column])
        except NotAnswers as error:
            return Problem(str(error), number, column)
    return row


def _with_boxes(rows: Sequence[Row | Problem], path: Path) -> list[Row | Problem]:
    repaired = [_repaired(row) for row in rows]
    if broken := sum(before != after for before, after in zip(rows, repaired, strict=True)):
        logger.warning("%s: %d of %d rows spell \\boxed with a backspace character; read as \\boxed", path, broken, len(rows))
    return repaired


def _repaired(value: Any) -> Any:
    """The same nested value with every broken \\boxed repaired."""
    if isinstance(value, str):
        return value.replace(BROKEN_BOX, BOX)
    if isinstance(value, list):
        return [_repaired(part) for part in value]
    return {key: _repaired(part) for key, part in value.items()} if isinstance(value, dict) else value


def _bad(row: Row | Problem, number: int) -> Iterator[Problem]:
    """Problems that keep a row from being read in any layout."""
    if isinstance(row, Problem):
        yield row
        return
    if not (row["data_source"] or "").strip():
        yield Problem(f"found {row['data_source']!r}, expected the name of a benchmark", number, "data_source")
    messages = row["prompt"] or []
    users = [message for message in messages if message and message["role"] == "user"]
    if len(users) != 1 or users[0]["content"] is None or not all(messages):
        roles = [message["role"] if message else None for message in messages]
        yield Problem(f"found messages with roles {roles}, expected exactly one user message with text", number, "prompt")


def _question_problems(row: Row, number: int, layout: Layout) -> Iterator[Problem]:
    if layout is LAYOUTS["arpo"] and own_question(row) is None:
        yield Problem("found None, expected the question", number, layout.question_column)
    elif not layout.question(row).strip():
        yield Problem("the question is empty", number, layout.question_column)


def _answers(row: Row, number: int, layout: Layout, outcome: str) -> tuple[tuple[str, ...], list[Problem]]:
    """The aliases that can be scored, and the problems with the others."""
    column = "reward_model.ground_truth"
    try:
        answers = layout.answers(ground_truth(row))
    except NotAnswers as error:
        return (), [Problem(str(error), number, column)]
    if not answers:
        return (), [Problem("found no answer, expected at least one", number, column)]
    if blank := [place for place, answer in enumerate(answers, start=1) if not answer.strip()]:
        return (), [Problem(f"answer {blank[0]} of {len(answers)} is empty", number, column)]
    if joined := [answer for answer in answers if ALIAS_SEPARATOR in answer]:
        return (), [Problem(f"found the answer {shown(joined[0])}, expected a string without {ALIAS_SEPARATOR}", number, column)]
    scored = tuple(answer for answer in answers if normal_form(answer, outcome))
    unscored = [answer for answer in answers if answer not in scored]
    if not unscored:
        return scored, []
    nothing = f"{shown(unscored[0])}, of which nothing is left once punctuation is removed as the scores do"
    if scored:
        return scored, [Problem(f"found the alias {nothing}; it is left out", number, column, "answer")]
    return (), [Problem(f"found {nothing}: no answer could be right; the row is left out", number, column, "row")]


def _ids(rows: Sequence[Row | Problem]) -> list[str]:
    """One id per row: `extra_info.index`, preceded by source and split if it is a number; made unique by the row number if it is missing or
    repeated (as in merged files)."""
    names = []
    for row in rows:
        if isinstance(row, Problem) or (index := row["extra_info"].get("index")) is None or index == "":
            names.append("")
        elif isinstance(index, str):
            names.append(index)
        else:
            parts = (row["data_source"], row["extra_info"].get("split"), index)
            names.append("-".join(str(part) for part in parts if part is not None))
    seen = Counter(names)
    return [name if name and seen[name] == 1 else f"{name or 'row'}#{number}" for number, name in enumerate(names)]
