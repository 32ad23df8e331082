"""What is wrong in a file of questions or passages, and how a value is shown in a message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file."""

    message: str
    """What was found and what was expected."""

    row: int | None = None
    """Counted from 0; None where it concerns the whole file."""

    column: str | None = None
    """Dotted for nested fields, e.g. `reward_model.ground_truth`; None where it concerns the whole file."""

    costs: Literal["file", "row", "answer"] = "file"
    """What a run does about it: it refuses the file, or it leaves out the row or this one of several answers."""

    def __str__(self) -> str:
        row = [] if self.row is None else [f"row {self.row}"]
        column = [] if self.column is None else [f"column {self.column}"]
        return ": ".join(filter(None, (", ".join(row + column), self.message)))


def shown(value: Any) -> str:
    """`repr` cut to a length that fits into a sentence; never raises."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number with too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
