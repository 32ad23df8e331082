"""The metrics of a run as JSON lines: a row per step, with its time by phase.

{"step": 3, "time": 1700000000.0, "phases_s": {"rollout": 2.1, "train": 1.4}, "reward": 0.31, ...}
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

Phase = Literal["startup", "rollout", "score", "advantage", "train", "sync", "eval", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a run meets them."""

STEP_PHASES: tuple[Phase, ...] = ("rollout", "score", "advantage", "train", "sync")
"""Phases that count in a step's printed seconds."""


class MetricsFile:
    """The file of one run, to which its main rank writes."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep rows up to step `resumed_step`: `row` is the last, `totals` has their phases. The file is replaced in one go."""
        rows = read_metrics(path) if path.exists() else []
        kept = [row for row in rows if row["step"] <= resumed_step]
        with whole(path) as part:
            part.write_bytes(b"".join(map(_line, kept)))
        self.totals = sum_phases(kept)
        self._path = path
        self.row: dict[str, Any] = kept[-1] if kept else {"step": None}
        self._row_offset = path.stat().st_size - len(_line(self.row)) if kept else 0

    def write(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> dict[str, Any]:
        """Append the step's row, or replace the last row if it belongs to the same step; return it."""
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3), "phases_s": {}}
        with self._path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            if self.row["step"] == step:
                row = {**self.row, "time": row["time"]}
                file.seek(self._row_offset)
            else:
                self._row_offset = end
            row["phases_s"] = {
                name: round(row["phases_s"].get(name, 0.0) + times.get(name, 0.0), 4) for name in {**row["phases_s"], **times}
            }
            row.update((name, value if math.isfinite(value) else None) for name, value in metrics.items())
            # Never shorter than the row it replaces: a reader, or a run resumed after a kill, would find the end of the old row after it.
            file.write(_line(row)[:-1].ljust(end - self._row_offset - 1) + b"\n")
        self.row = row
        return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order: {"step": int, "time": unix seconds, "phases_s": {phase: seconds}, metric: float or None}.

    An incomplete last line, left by a killed run, is ignored. Raises UserError for any other line that is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); remove the line, or move the file away to start a new one"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}, line {number}: expected an object with an integer 'step', found {line[:80]!r}; remove the line")
        rows.append(row)
    return rows


def sum_phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per phase over metric rows, in the order of PHASES."""
    times = [row["phases_s"] for row in rows if "phases_s" in row]
    return {name: sum(seconds.get(name, 0.0) for seconds in times) for name in PHASES if any(name in seconds for seconds in times)}


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
