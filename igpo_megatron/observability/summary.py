"""The end of a run or of an evaluation: summary.json, the report, and the table on the console."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from igpo_megatron.config.schema import Config
from igpo_megatron.observability.metrics import headline, max_gap, outcomes
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.run_folder import RunFolder, read_object, step_name, write_whole
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.types import EVALUATION_KINDS, gain_of_turn, standard_error


def finish(config: Config, folder: RunFolder, tracker: Tracker, learned: Mapping[str, Any] | None = None) -> None:
    """Write summary and report, and print the table. `learned`: more for the summary."""
    from igpo_megatron.observability.report.page import write_report

    rows = read_metrics(folder.metrics)
    ends = {}
    for name, step in (("before", 0), ("after", config.run.steps)):
        path = folder.eval / f"{step_name(step)}.json"
        ends[name] = headline(read_object(path, "restore it from a copy")) if path.is_file() else None
    phases = tracker.phases_total()
    summary = {
        **ends,
        "steps": config.run.steps,
        "wall_s": round(sum(phases.values()), 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in phases.items()},
        "max_logprob_gap": max_gap(rows) or 0.0,
        "gain_by_turn": gain_by_turn(rows),
        **(learned or {}),
    }
    if tracker.step < config.run.steps:
        summary["stopped_at"] = tracker.step
    write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")
    report = write_report(folder.root)
    tracker.close()
    show_finished(summary, report)


def gain_by_turn(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean gain of each turn over the first and the last five steps."""
    result = []
    for turn in range(1, 100):
        values = [row[gain_of_turn(turn)] for row in rows if row.get(gain_of_turn(turn)) is not None]
        if not values:
            break
        first, last = values[:5], values[-5:]
        result.append({"first": sum(first) / len(first), "last": sum(last) / len(last)})
    return result


def show_finished(summary: dict[str, Any], report: Path) -> None:
    """The table at the end of a run, and where to look next."""
    console = Console()
    console.print(summary_table(summary))
    if sentence := held_out_loss(summary):
        console.print(sentence, soft_wrap=True)
    console.print(f"report: {report}", soft_wrap=True)


def held_out_loss(summary: Mapping[str, Any]) -> str | None:
    """What the held-out loss of a supervised run has come to, and whether it ended the run; None where there is none."""
    found = summary.get("held_out")
    if not found or found["best_step"] is None:
        return None
    step = found["best_step"]
    where = "checkpoints/best" if step else "the model that it began with"
    early = f"stopped early after step {summary['stopped_at']} of {summary['steps']}: " if "stopped_at" in summary else ""
    return f"{early}the least held-out loss is {found['best_nll']:.4f}, after step {step} ({where})"


def summary_table(summary: dict[str, Any]) -> Table:
    """Held-out scores before and after, gain by turn and time by phase."""
    table = Table(title=f"{summary.get('stopped_at', summary['steps'])} steps in {summary['wall_s'] / 60:.1f} min", title_justify="left")
    for heading in ("held-out questions", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading.startswith("held") else "right")
    scores = outcomes(summary.get("before") or {}, summary.get("after") or {})
    for row in scores:
        (before, _), (after, error) = row["sides"]
        if row["change"] is not None:
            spread = "" if error is None else f" ± {error:.3f}"
            table.add_row(row["label"], f"{before:.3f}", f"{after:.3f}{spread}", f"{row['change']:+.3f}")
    if scores:
        table.add_section()
    for turn, gain in enumerate(summary.get("gain_by_turn", []), start=1):
        table.add_row(f"mean gain of turn {turn}", f"{gain['first']:+.3f}", f"{gain['last']:+.3f}", f"{gain['last'] - gain['first']:+.3f}")
    table.add_section()
    for phase, seconds in summary["phases_s"].items():
        table.add_row(f"time: {phase}", "", f"{seconds:.1f} s", "")
    table.add_row("largest engine/trainer log-prob gap", "", f"{summary['max_logprob_gap']:.1e}", "")
    return table


EVALUATED = {
    "f1_sampled": "F1, sampled",
    standard_error("f1_sampled"): "±",
    "f1_greedy": "F1, greedy",
    "em_greedy": "EM, greedy",
    "format_valid": "format",
    "searches_per_question": "searches",
}
"""Columns of an evaluation."""


def evaluation_table(report: Mapping[str, Any]) -> Table:
    """The main scores of one evaluation: a row for every source, and one for all `n` questions. ± is a standard error over questions."""
    kinds: dict[str, Any] = {kind: report[kind] for kind in EVALUATION_KINDS if kind in report}
    shown = {key: label for key, label in EVALUATED.items() if headline(kinds)[key] is not None}
    columns = [Column(label.replace(" ", "\n"), justify="right") for label in ("n", *shown.values())]
    table = Table(Column("source", overflow="fold"), *columns, box=SIMPLE_HEAD, padding=0, pad_edge=False)

    def add(name: str, report: Mapping[str, Any]) -> None:
        scores = headline(report)
        values = (scores[key] for key in shown)
        table.add_row(name, str(scores["questions"]), *("" if value is None else f"{value:.3f}" for value in values))

    for source in sorted({source for scores in kinds.values() for source in scores["per_source"]}):
        add(source, {kind: scores["per_source"][source] for kind, scores in kinds.items() if source in scores["per_source"]})
    table.add_section()
    add("all", kinds)
    return table
