"""One self-contained HTML page about a run: facts, scores, curves, and trajectories to read turn by turn.

    config.json, summary.json, metrics.jsonl, rollouts/*.parquet, eval/* ──collect──> plain data ──report.html.j2──> report.html

The page loads nothing and works from file://. Text from tools and models is untrusted: the template escapes it, and the script in
the page only sets it as text. `Limits` bounds the size, and the page states what was left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from igpo_megatron.observability.metrics_file import PHASES, read_metrics, sum_phases
from igpo_megatron.observability.report.charts import STANDARD, Limits, charts_of
from igpo_megatron.observability.report.header import count_questions, facts_of, outcomes_of, scores_by_source, value_at
from igpo_megatron.observability.report.trajectories import files_left_out, find_tokenizer, read_file, rollout_files
from igpo_megatron.observability.run_folder import RunFolder, public_config, read_object, write_whole
from igpo_megatron.types import UserError

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(run_folder: Path, limits: Limits = STANDARD) -> Path:
    """Write `<run_folder>/report.html` from what the run has written so far, and return its path.

    Raises UserError if the folder holds no run, or if one of its files is damaged.
    """
    page = collect(run_folder, limits)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)
    write_whole(RunFolder(run_folder).report, html)
    return RunFolder(run_folder).report


def collect(run_folder: Path, limits: Limits) -> dict[str, Any]:
    """Everything the template shows, as plain data."""
    folder = RunFolder(run_folder)
    files = rollout_files(run_folder)
    evals = [_read_json(path) for path in sorted(folder.eval.glob("step_*.json"))]
    if not (folder.metrics.is_file() or files or evals):
        raise UserError(f"{run_folder}: no run to report on; expected metrics.jsonl, rollouts/step_*.parquet or eval/step_*.json in it")
    config = public_config(_read_json(folder.config) or {})
    summary = _read_json(folder.summary)
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    phases = summary["phases_s"] if summary else sum_phases(rows)
    tokenizer = find_tokenizer(config)
    return {
        "title": value_at(config, "run.name") or run_folder.resolve().name,
        "finished": summary is not None,
        "last_step": rows[-1]["step"] if rows else None,
        "facts": facts_of(config, rows, summary),
        "outcomes": outcomes_of(summary, evals),
        "questions": count_questions(summary, evals),
        "sources": scores_by_source(evals),
        "phases": [{"name": name, "seconds": seconds, "colour": PHASES.index(name)} for name, seconds in phases.items() if name in PHASES],
        "config_text": json.dumps(config, indent=2) if config else "",
        "data": {
            "charts": charts_of(rows, limits),
            "files": [read_file(path, label, tokenizer, limits) for path, label in files],
            "left_out": files_left_out(run_folder, files),
        },
    }


def _read_json(path: Path) -> Any:
    """The object in a JSON file; None if the file is missing. Raises UserError for anything else."""
    return read_object(path, "remove it to leave it out of the report") if path.is_file() else None
