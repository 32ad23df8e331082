"""Report what is in a file of questions and everything wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from igpo_megatron.data.layouts import LayoutName
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.question_files import inspect
from igpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class Report:
    """Result of checking one file."""

    path: Path
    layout: str | None
    """IGPO, ARPO or Search-R1; None where it cannot be told."""

    sources: dict[str, int]
    """Usable rows per source."""

    problems: tuple[Problem, ...]
    """In row order; rows that a problem costs are not counted in `sources`."""


def check_file(
    path: Path | str,
    layout: LayoutName = "auto",
    outcome: str = "f1",
    too_long: Callable[[Prompt], str | None] = lambda prompt: None,
) -> Report:
    """Read a parquet file of questions; never raises for what is in it. `too_long`: why a question does not fit the context, if so."""
    path = Path(path)
    found = inspect(path, layout, outcome)
    reasons = {row: reason for row, prompt in found.questions if (reason := too_long(prompt)) is not None}
    problems = [*found.problems, *(Problem(reason, row, "prompt", "row") for row, reason in reasons.items())]
    problems.sort(key=lambda problem: -1 if problem.row is None else problem.row)
    sources = Counter(prompt.source for row, prompt in found.questions if row not in reasons)
    return Report(path, found.layout.name if found.layout else None, dict(sources), tuple(problems))
