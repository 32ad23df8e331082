"""Problems in a file of questions or passages, and how messages show a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file."""

    message: str
    """What was found and what was expected."""

    row: int | None = None
    """Counted from 0; None if it concerns the complete file."""

    column: str | None = None
    """Dotted for nested fields, e.g. `reward_model.ground_truth`; None if it concerns no single column."""

    costs: Literal["file", "row", "answer"] = "file"
    """What a run gives up because of it: it refuses the file, or leaves out the row, or one of several answers."""

    def __str__(self) -> str:
        row = [] if self.row is None else [f"row {self.row}"]
        column = [] if self.column is None else [f"column {self.column}"]
        return ": ".join(filter(None, (", ".join(row + column), self.message)))


def shown(value: Any) -> str:
    """`repr`, shortened to fit into a sentence; never raises."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number with too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
