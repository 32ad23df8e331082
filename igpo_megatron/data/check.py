"""Report what is in a file of questions and everything wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from igpo_megatron.data.prompts import Problem, inspect


@dataclass(frozen=True, slots=True)
class Report:
    """Result of checking one file."""

    path: Path
    layout: str | None
    """IGPO, ARPO or Search-R1; None where the columns fit none of them."""

    sources: dict[str, int]
    """Usable rows per source."""

    problems: tuple[Problem, ...]
    """In row order; rows with a problem are not counted in `sources`."""


def check_file(path: Path | str) -> Report:
    """Read a parquet file of questions; never raises for what is in it."""
    path = Path(path)
    layout, prompts, problems = inspect(path)
    return Report(path, layout.name if layout else None, dict(Counter(prompt.source for prompt in prompts)), tuple(problems))
