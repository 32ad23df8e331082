"""Read public question sets, each in its published form, into questions with all their aliases.

record ──layout, recognised by its fields──> Question | None (no short answer) | Unusable

A new set is one line in LAYOUTS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpo_megatron.data.answers import NotAnswers, as_answers
from igpo_megatron.data.layouts import ALIAS_SEPARATOR
from igpo_megatron.data.problems import shown

Row = Mapping[str, Any]


class Unusable(ValueError):
    """A record that is not a usable question; the message says what was found and what was expected."""

    def __init__(self, column: str, message: str):
        super().__init__(message)
        self.column = column


@dataclass(frozen=True, slots=True)
class Question:
    """One record."""

    text: str
    answers: tuple[str, ...]
    """Every alias once, the main one first."""

    own_id: str | None
    """As in the file; None where it has none."""


@dataclass(frozen=True, slots=True)
class QaLayout:
    """One published layout of a set."""

    name: str
    source: str | None
    """Name of its set in this project's data; None if several sets use this layout."""

    fits: Callable[[Row], bool]
    question: str
    """Field of the question, dotted if nested."""

    answers: Callable[[Row], Iterable[Any]]
    answer_column: str
    own_id: str | None
    """Field of the id."""

    def read(self, row: Row, aliases: Mapping[str, list[str]]) -> Question | None:
        """None if the record has no (short) answer by design. `aliases`: of 2WikiMultihopQA, by entity. Raises Unusable."""
        text = _field(row, self.question)
        if not isinstance(text, str) or not text.strip():
            raise Unusable(self.question, f"found {shown(text)}, expected the question")
        if row.get("answerable") is False:  # MuSiQue's full version
            return None
        try:
            found = [*self.answers(row), *_of_entity(row, aliases)]
        except NotAnswers as wrong:
            raise Unusable(self.answer_column, str(wrong)) from None
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            found_instead = shown(_field(row, self.answer_column))
            raise Unusable(self.answer_column, f"found {found_instead}, expected the answers of {self.name} ({error!r})") from None
        if unfit := [answer for answer in found if not isinstance(answer, str) or ALIAS_SEPARATOR in answer]:
            raise Unusable(self.answer_column, f"found the answer {shown(unfit[0])}, expected a string without {ALIAS_SEPARATOR}")
        answers = tuple(dict.fromkeys(answer.strip() for answer in found if answer.strip()))
        if not answers and self.source == "nq":
            return None
        if not answers:
            raise Unusable(self.answer_column, "found no answer, expected at least one (published test files have none)")
        if any("\ud800" <= character <= "\udfff" for character in text + "".join(answers)):
            raise Unusable(self.question, "found half a surrogate pair, which JSON can hold but UTF-8 cannot; correct the record")
        own = row.get(self.own_id) if self.own_id else None
        if not isinstance(own, str | int | float | None):
            raise Unusable(self.own_id or "", f"found {shown(own)}, expected a string or a number")
        return Question(" ".join(text.split()), answers, None if own is None else str(own))


def has(*fields: str) -> Callable[[Row], bool]:
    """Recognises records with all of these fields."""
    return lambda row: all(field in row for field in fields)


def _plain(row: Row) -> list[str]:
    """`answer` or `answers`, then the fields that usually hold aliases."""
    given = row["answers"] if "answers" in row else row["answer"]
    return [answer for value in (given, row.get("answer_aliases"), row.get("aliases")) for answer in as_answers(value)]


def _of_entity(row: Row, aliases: Mapping[str, list[str]]) -> list[str]:
    entity = row.get("answer_id")
    return aliases.get(entity, []) if isinstance(entity, str) else []


def _in_field(name: str) -> Callable[[Row], tuple[str, ...]]:
    """All answers are in one field."""
    return lambda row: as_answers(row[name])


def _span_answers(row: Row) -> Iterator[str]:
    """Natural Questions' short answers: spans of a page's tokens, marked by one annotator (training) or five (dev), in order.

    None where only a long answer was marked. The simplified files have document_text "A page <P> of tokens", the original ones
    document_tokens [{token, html_token}], both annotations [{short_answers [{start_token, end_token}], yes_no_answer}].
    """
    tokens = row["document_text"].split(" ") if "document_text" in row else [token["token"] for token in row["document_tokens"]]
    for annotation in row["annotations"]:
        for span in annotation["short_answers"]:
            start, end = span["start_token"], span["end_token"]
            if not 0 <= start < end <= len(tokens):
                raise ValueError(f"the span {start} to {end} is not among the {len(tokens)} tokens")
            yield " ".join(tokens[start:end])
        if annotation["yes_no_answer"] in ("YES", "NO"):
            yield annotation["yes_no_answer"].lower()


def _hub_answers(row: Row) -> Iterator[str]:
    """The same from the Hugging Face files: annotations {short_answers [{text [...]}], yes_no_answer [-1 none, 0 no, 1 yes]}."""
    annotations = row["annotations"]
    for short in annotations["short_answers"]:
        yield from as_answers(short["text"])
    for answer in annotations["yes_no_answer"]:
        if answer in (0, 1):
            yield ("no", "yes")[answer]


def _is_trivia_hub(row: Row) -> bool:
    return "question_id" in row and isinstance(row.get("answer"), dict)


LAYOUTS = (
    QaLayout("Natural Questions", "nq", has("question_text", "annotations"), "question_text", _span_answers, "annotations", "example_id"),
    QaLayout("Natural Questions (Hugging Face)", "nq", has("document", "annotations"), "question.text", _hub_answers, "annotations", "id"),
    QaLayout("TriviaQA", "tq", has("QuestionId", "Question", "Answer"), "Question", _in_field("Answer"), "Answer", "QuestionId"),
    QaLayout("TriviaQA (Hugging Face)", "tq", _is_trivia_hub, "question", _in_field("answer"), "answer", "question_id"),
    QaLayout("MuSiQue", "musique", has("answer", "answer_aliases", "paragraphs"), "question", _plain, "answer", "id"),
    QaLayout("2WikiMultihopQA", "2wiki", has("_id", "answer", "evidences"), "question", _plain, "answer", "_id"),
    QaLayout("2WikiMultihopQA (Hugging Face)", "2wiki", has("id", "answer", "evidences"), "question", _plain, "answer", "id"),
    QaLayout("HotpotQA", "hotpotqa", has("_id", "answer", "supporting_facts"), "question", _plain, "answer", "_id"),
    QaLayout("HotpotQA (Hugging Face)", "hotpotqa", has("id", "answer", "supporting_facts"), "question", _plain, "answer", "id"),
    QaLayout("FlashRAG", None, has("question", "golden_answers"), "question", _in_field("golden_answers"), "golden_answers", "id"),
    QaLayout("PopQA", "popqa", has("question", "possible_answers"), "question", _in_field("possible_answers"), "possible_answers", "id"),
    QaLayout("question and answers", None, has("question", "answers"), "question", _plain, "answers", "id"),
    QaLayout("question and answer", None, has("question", "answer"), "question", _plain, "answer", "id"),
    QaLayout("Question and Answer", None, has("Question", "Answer"), "Question", _in_field("Answer"), "Answer", None),  # Bamboogle
)
"""In order of recognition."""

SOURCES = {
    "hotpotqa": r"hotpot",
    "2wiki": r"2wiki",
    "musique": r"musique",
    "tq": r"trivia|(?<![a-z])tq(?![a-z])",
    "nq": r"natural.?questions|(?<![a-z])nq(?![a-z])",
    "popqa": r"popqa",
    "Bamboogle": r"bamboogle",
}
"""Name of a set in this project's data (IGPO's spelling) -> how it is written in names of files and folders."""

SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


def recognise(row: Row) -> QaLayout | None:
    """The layout of a file, recognised by one of its records; None if unknown."""
    return next((layout for layout in LAYOUTS if layout.fits(row)), None)


def source_of(path: Path) -> str | None:
    """The set named in a file's name, or in its folder's: `hotpotqa/dev.jsonl` -> `hotpotqa`."""
    for name in (path.name.lower(), path.parent.name.lower()):
        for source, pattern in SOURCES.items():
            if re.search(pattern, name):
                return source
    return None


def split_of(path: Path) -> str | None:
    """`train`, `dev` or `test`, if the name of the file or its folder contains it."""
    for name in (path.name.lower(), path.parent.name.lower()):
        if found := _SPLIT.search(name):
            return SPLITS[found.group(1)]
    return None


def _field(row: Row, dotted: str) -> Any:
    found: Any = row
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
