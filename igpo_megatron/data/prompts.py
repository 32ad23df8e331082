"""Read questions from parquet and draw them in an order that can be resumed to the row.

    parquet -> table -> layout (IGPO, ARPO or Search-R1, recognised by its columns) -> Prompt or Problem, row by row
    Prompts + (seed, number drawn) -> next Prompts

The layouts, as published (aliases always keep their order and are never rewritten; a system prompt in the data is not used):

    IGPO        reward_model.ground_truth "alias<|answer_split|>alias", question in the one user message
    ARPO        reward_model.ground_truth one string, question in extra_info.question; broken \\boxed is repaired with a warning
    Search-R1   reward_model.ground_truth {"target": [alias, ...]}, question after "Question:" in the user message
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from igpo_megatron.types import Prompt, UserError

logger = logging.getLogger(__name__)

BROKEN_BOX, BOX = "\boxed", "\\boxed"
"""ARPO's published files hold a backspace and `oxed` where \\boxed was meant."""

ALIAS_SEPARATOR = "<|answer_split|>"
"""Between aliases in IGPO's `ground_truth`."""

SHOWN_PROBLEMS = 10
"""Problems that the error of `read_prompts` lists; tools/prepare_data.py lists all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file of questions."""

    message: str
    """What was found and what was expected."""

    row: int | None = None
    """Counted from 0; None where it concerns the whole file."""

    column: str | None = None
    """Dotted for nested fields, e.g. `reward_model.ground_truth`; None where it concerns the whole file."""

    def __str__(self) -> str:
        row = [] if self.row is None else [f"row {self.row}"]
        column = [] if self.column is None else [f"column {self.column}"]
        return ": ".join(filter(None, (", ".join(row + column), self.message)))


Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """One published way to lay out questions."""

    name: str
    matches: Callable[[pa.Schema], bool]
    question: Callable[[Row], str]
    """Row -> question; the row has exactly one user message."""

    question_column: str
    answers: Callable[[Any], list[str]]
    """Value of reward_model.ground_truth -> aliases."""


def read_prompts(path: Path | str) -> list[Prompt]:
    """All questions of a parquet file, in row order. ValueError names file, row and column of the problems, if there are any."""
    path = Path(path)
    _, prompts, problems = inspect(path)
    if problems:
        shown = [f"  - {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            shown.append(f"  - and {len(problems) - SHOWN_PROBLEMS} more; `python tools/prepare_data.py check {path}` lists all")
        raise UserError("\n".join([f"{path}: cannot be used as questions:", *shown]))
    return prompts


def inspect(path: Path) -> tuple[Layout | None, list[Prompt], list[Problem]]:
    """(layout, good rows as prompts, everything wrong) of a parquet file; the layout is None where it cannot be told."""
    if not path.is_file():
        return None, [], [Problem("no such file; expected a parquet file of questions")]
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        return None, [], [Problem(f"not a parquet file ({str(error).splitlines()[0]})")]
    problems = [Problem(message, column=column) for column, message in _schema_problems(schema)]
    if problems:
        return None, [], problems
    layout = next((layout for layout in LAYOUTS if layout.matches(schema)), None)
    if layout is None:
        found = schema.field("reward_model").type.field("ground_truth").type
        expected = "a string (IGPO, ARPO) or a struct with a list of strings `target` (Search-R1)"
        return None, [], [Problem(f"found type {found}, expected {expected}", column="reward_model.ground_truth")]
    used = [name for name in ("data_source", "prompt", "reward_model", "extra_info", "question") if name in schema.names]
    try:
        rows = pq.read_table(path, columns=used).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        return layout, [], [Problem(f"the parquet file is damaged ({str(error).splitlines()[0]})")]
    if not rows:
        return layout, [], [Problem("the file has no rows; expected at least one question")]
    repaired = [_repaired(row) for row in rows]
    if broken := sum(before != after for before, after in zip(rows, repaired, strict=True)):
        logger.warning("%s: %d of %d rows spell \\boxed with a backspace character; read as \\boxed", path, broken, len(rows))
    rows = repaired
    prompts: list[Prompt] = []
    for (number, row), name in zip(enumerate(rows), _ids(rows), strict=True):
        wrong = [Problem(message, number, column) for column, message in _row_problems(row, layout)]
        problems += wrong
        if not wrong:
            answers = layout.answers(row["reward_model"]["ground_truth"])
            prompts.append(Prompt(name, layout.question(row), tuple(answers), row["data_source"]))
    return layout, prompts, problems


# ---- columns


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _struct_field(kind: pa.DataType, name: str) -> pa.DataType | None:
    """Type of a struct's field; None where it is no struct or has no such field."""
    return kind.field(name).type if pa.types.is_struct(kind) and kind.get_field_index(name) >= 0 else None


def _column_field(schema: pa.Schema, column: str, field: str) -> pa.DataType | None:
    return _struct_field(schema.field(column).type, field) if column in schema.names else None


def _schema_problems(schema: pa.Schema) -> Iterator[tuple[str, str]]:
    """(column, message) for every column that no layout could be read without."""
    expected: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
        "data_source": ("string", _is_string),
        "prompt": ("list of structs with role and content", _is_messages),
        "reward_model": ("struct with ground_truth", lambda kind: _struct_field(kind, "ground_truth") is not None),
    }
    for column, (description, fits) in expected.items():
        if column not in schema.names:
            yield column, f"column is missing (found {', '.join(schema.names) or 'none'}); expected {description}"
        elif not fits(schema.field(column).type):
            yield column, f"found type {schema.field(column).type}, expected {description}"


def _is_messages(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return False
    fields = [_struct_field(kind.value_type, name) for name in ("role", "content")]
    return all(field is not None and _is_string(field) for field in fields)


def _is_search_r1(schema: pa.Schema) -> bool:
    truth = _column_field(schema, "reward_model", "ground_truth")
    target = _struct_field(truth, "target") if truth is not None else None
    return target is not None and _is_list(target) and _is_string(target.value_type)


def _has_plain_truth(schema: pa.Schema) -> bool:
    truth = _column_field(schema, "reward_model", "ground_truth")
    return truth is not None and _is_string(truth)


def _is_arpo(schema: pa.Schema) -> bool:
    question = _column_field(schema, "extra_info", "question")
    return _has_plain_truth(schema) and question is not None and _is_string(question)


# ---- rows


def _user_message(row: Row) -> str:
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def _asked(row: Row) -> str:
    """Search-R1: its own question column where the file kept it, else what follows the instruction."""
    return row["question"] if isinstance(row.get("question"), str) else _user_message(row).rpartition("Question:")[2].strip()


LAYOUTS = (
    Layout("Search-R1", _is_search_r1, _asked, "prompt", lambda truth: truth["target"] or []),
    Layout("ARPO", _is_arpo, lambda row: row["extra_info"]["question"], "extra_info.question", lambda truth: [truth]),
    Layout("IGPO", _has_plain_truth, _user_message, "prompt", lambda truth: truth.split(ALIAS_SEPARATOR)),
)
"""In order of recognition: the last one accepts what the others do not claim."""


def _row_problems(row: Row, layout: Layout) -> Iterator[tuple[str, str]]:
    """(column, message) for everything wrong with one row."""
    if not (row["data_source"] or "").strip():
        yield "data_source", f"found {row['data_source']!r}, expected the name of a benchmark"
    users = [message for message in row["prompt"] or [] if message and message["role"] == "user"]
    if len(users) != 1 or users[0]["content"] is None:
        roles = [message["role"] if message else None for message in row["prompt"] or []]
        yield "prompt", f"found messages with roles {roles}, expected exactly one user message with text"
    elif layout.question_column.startswith("extra_info") and not isinstance((row["extra_info"] or {}).get("question"), str):
        yield layout.question_column, "found None, expected the question"
    elif not layout.question(row).strip():
        yield layout.question_column, "the question is empty"
    truth = (row["reward_model"] or {}).get("ground_truth")
    answers = layout.answers(truth) if truth is not None else []
    if not answers:
        yield "reward_model.ground_truth", "found no answer, expected at least one"
    elif blank := [number for number, answer in enumerate(answers, start=1) if not (answer or "").strip()]:
        yield "reward_model.ground_truth", f"answer {blank[0]} of {len(answers)} is empty"


def _repaired(value: Any) -> Any:
    """The same nested value with every broken \\boxed made whole."""
    if isinstance(value, str):
        return value.replace(BROKEN_BOX, BOX)
    if isinstance(value, list):
        return [_repaired(part) for part in value]
    return {key: _repaired(part) for key, part in value.items()} if isinstance(value, dict) else value


def _ids(rows: Sequence[Row]) -> list[str]:
    """One id per row: `extra_info.index`, after split and source where it is a mere number; made unique by the row number where it is
    absent or repeated (merged files repeat it)."""
    names = []
    for row in rows:
        extra = row.get("extra_info") or {}
        index = extra.get("index")
        numbered = "-".join(str(part) for part in (row["data_source"], extra.get("split"), index) if part is not None)
        names.append(index if isinstance(index, str) and index else numbered if index is not None else "")
    seen = Counter(names)
    return [name if name and seen[name] == 1 else f"{name or 'row'}#{number}" for number, name in enumerate(names)]


# ---- order


class StreamState(TypedDict):
    """What a checkpoint keeps of a `PromptStream`."""

    drawn: int
    open: list[int]
    fingerprint: str
    questions: int
    seed: int
    shuffle: bool
    balance: str


class PromptStream:
    """An endless order of questions that is a pure function of (questions, seed, shuffle, balance, number drawn).

    balance="none": epochs over all rows. balance="source": rounds in which every source gives one question, in an order that changes
    from round to round; each source runs through epochs of its own.

    A place in that order is an ordinal, from 0. What was drawn stays open until it is said to be done, and a resumed stream draws what
    was open first: so no question is lost or used twice, however many are under way when a checkpoint is taken.
    """

    def __init__(self, files: Sequence[Path | str], *, seed: int, shuffle: bool, balance: Literal["none", "source"]):
        """Reads all files at once. ValueError as in `read_prompts`."""
        self.prompts = [prompt for path in files for prompt in read_prompts(path)]
        if not self.prompts:
            raise UserError("no files of questions were given; name at least one parquet file in data.train")
        self.seed, self.shuffle, self.balance = seed, shuffle, balance
        self.drawn = 0
        """Ordinals below this one have been drawn."""

        self._open: set[int] = set()
        self._returned: list[int] = []
        self._rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            self._rows.setdefault(prompt.source if balance == "source" else "", []).append(row)
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._fingerprint = _fingerprint(self.prompts)

    def __len__(self) -> int:
        """Questions in one epoch."""
        return len(self.prompts)

    def draw(self, n: int) -> list[int]:
        """The next `n` ordinals, those first that were open when a resumed run was stopped."""
        returned, self._returned = self._returned[:n], self._returned[n:]
        new = n - len(returned)
        ordinals = [*returned, *range(self.drawn, self.drawn + new)]
        self.drawn += new
        self._open.update(ordinals)
        return ordinals

    def done(self, ordinals: Iterable[int]) -> None:
        """These were trained, or dropped for good."""
        self._open.difference_update(ordinals)

    def state(self) -> StreamState:
        """Everything needed to go on from here, as JSON values."""
        return StreamState(
            drawn=self.drawn,
            open=sorted({*self._open, *self._returned}),
            fingerprint=self._fingerprint,
            questions=len(self.prompts),
            seed=self.seed,
            shuffle=self.shuffle,
            balance=self.balance,
        )

    def load_state(self, state: StreamState) -> None:
        """Go on where `state` was taken. ValueError where questions or order are not those of the state."""
        problems = []
        if state["fingerprint"] != self._fingerprint:
            problems.append(
                f"the training questions changed since the checkpoint ({state['questions']} then, {len(self.prompts)} now); "
                "restore the files of data.train or start a new run"
            )
        settings: tuple[tuple[str, object, object], ...] = (
            ("run.seed", state["seed"], self.seed),
            ("data.shuffle", state["shuffle"], self.shuffle),
            ("data.balance", state["balance"], self.balance),
        )
        for key, then, now in settings:
            if then != now:
                problems.append(f"{key} was {then!r} at the checkpoint and is {now!r} now; set it back or start a new run")
        if problems:
            raise UserError("cannot resume the order of questions:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.drawn, self._returned = state["drawn"], [*state.get("open", [])]

    def question(self, ordinal: int) -> Prompt:
        """The question at a place of the endless order."""
        sources = sorted(self._rows)
        turn, slot = divmod(ordinal, len(sources))
        source = sources[self._order("round", turn, len(sources))[slot]]
        rows = self._rows[source]
        epoch, place = divmod(turn, len(rows))
        return self.prompts[rows[self._order(f"source {source}", epoch, len(rows))[place]]]

    def _order(self, name: str, epoch: int, count: int) -> list[int]:
        """Order of `count` things in one epoch; the last one asked for is kept."""
        if self._orders.get(name, (None,))[0] != epoch:
            self._orders[name] = epoch, permutation(count, f"{self.seed}/{name}/{epoch}") if self.shuffle else list(range(count))
        return self._orders[name][1]


def permutation(count: int, key: str) -> list[int]:
    """Shuffle of range(count) by hashing: the same on every machine and Python version, without a generator to carry."""
    return sorted(range(count), key=lambda number: hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest())


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of all questions in order; where the files lie does not matter."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.question, prompt.answers, prompt.source)).encode())
    return digest.hexdigest()
