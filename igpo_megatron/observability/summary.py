"""The end of a run: summary.json, the report, and the table on the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpo_megatron.config.schema import Config
from igpo_megatron.observability.metrics import headline, max_gap
from igpo_megatron.observability.run_folder import RunFolder, summary_table, write_whole
from igpo_megatron.observability.tracker import Tracker, read_metrics


def finish(config: Config, folder: RunFolder, tracker: Tracker) -> None:
    """Write summary and report, and print the table."""
    from igpo_megatron.observability.report.page import write_report

    rows = read_metrics(folder.root / "metrics.jsonl")
    ends = {}
    for name, step in (("before", 0), ("after", config.run.steps)):
        path = folder.eval / f"step_{step:06d}.json"
        ends[name] = headline(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    phases = tracker.phases_total()
    summary = {
        **ends,
        "steps": config.run.steps,
        "wall_s": round(sum(phases.values()), 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in phases.items()},
        "max_logprob_gap": max_gap(rows) or 0.0,
        "gain_by_turn": gain_by_turn(rows),
    }
    write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
    report = write_report(folder.root)
    tracker.close()
    show_finished(summary, report)


def gain_by_turn(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean gain of each turn over the first and the last five steps."""
    result = []
    for turn in range(1, 100):
        values = [row[f"gain_turn_{turn}"] for row in rows if row.get(f"gain_turn_{turn}") is not None]
        if not values:
            break
        first, last = values[:5], values[-5:]
        result.append({"first": sum(first) / len(first), "last": sum(last) / len(last)})
    return result


def show_finished(summary: dict[str, Any], report: Path) -> None:
    """The table at the end of a run, and where to look next."""
    from rich.console import Console

    console = Console()
    console.print(summary_table(summary))
    console.print(f"report: {report}", soft_wrap=True)
