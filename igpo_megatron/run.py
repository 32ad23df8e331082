"""A run's folder: where everything lies, and whether a run may start, resume or is already finished.

runs/<name>/
    config.json      resolved configuration (no secrets)
    metrics.jsonl    one line per step
    crashes.log      tracebacks of trajectories that ended as `crashed`
    rollouts/        step_000001.parquet ...    everything needed to replay a step
    eval/            step_000000.json and the rollouts behind each
    checkpoints/     step_000010/ ...
    summary.json     written last: its presence means the run is finished
    report.html
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from igpo_megatron.config.load import ConfigError, differing_keys, to_json
from igpo_megatron.config.schema import Config

MAY_CHANGE = (
    *("parallel.", "rollout.engine.", "run.threads", "run.resume", "track.", "checkpoint.keep", "checkpoint.in_background"),
    # A run that its search provider stopped goes on with another key, slower, or through a proxy.
    *("search.api_key_env", "search.attempts", "search.breaker_", "search.cache", "search.deadline_s", "search.max_concurrency"),
    *("search.rate_per_s", "search.timeout_s", "search.use_proxy", "search.vectors"),
)
"""Settings that say how a run is executed, not what it computes: they may differ when it resumes."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def crashes(self) -> Path:
        return self.root / "crashes.log"

    @property
    def eval(self) -> Path:
        return self.root / "eval"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def folder_for(config: Config) -> RunFolder:
    """The folder a configuration names."""
    return RunFolder(config.run.folder / config.run.name)


def open_folder(config: Config) -> RunFolder:
    """Check that the run may start or resume in its folder. Raises ConfigError. Writes nothing.

    A folder made with other settings is refused with the keys that differ; with `run.resume=never` any used folder is.
    """
    folder = folder_for(config)
    if not folder.config.is_file():
        return folder
    how = f"choose another run.name, or remove {folder.root} to start again"
    if config.run.resume == "never":
        raise ConfigError([f"run.resume=never, but {folder.root} already holds a run; {how}"])
    old = _read(folder.config, f"write it from a copy, or {how}")
    new = json.loads(to_json(config))
    changed = [row for row in differing_keys(old, new) if not row.startswith(MAY_CHANGE)]
    if changed:
        raise ConfigError([f"{folder.root} was made with other settings ({how}):", *changed])
    return folder


def claim(folder: RunFolder, config: Config) -> None:
    """Make the folder and save the resolved configuration in it."""
    for path in (folder.rollouts, folder.eval, folder.checkpoints):
        path.mkdir(parents=True, exist_ok=True)
    whole = folder.config.with_suffix(".tmp")
    whole.write_text(to_json(config), encoding="utf-8")
    os.replace(whole, folder.config)


def forget_after(folder: RunFolder, step: int) -> None:
    """Remove rollouts and evaluations of steps after `step`: the run is back there, and will train and score those steps anew."""
    for path in (*folder.rollouts.glob("step_??????*"), *folder.eval.glob("step_??????*")):
        number = path.name[len("step_") :][:6]
        if number.isdecimal() and int(number) > step:
            path.unlink()


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """The finished run's summary; None while it is not finished."""
    return _read(folder.summary, "remove it, and the same command writes it again") if folder.summary.is_file() else None


def _read(path: Path, what_to_do: str) -> dict[str, Any]:
    """The object in a file of ours. Raises ConfigError with `what_to_do` where the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{path} is damaged ({error}); {what_to_do}"]) from error
    if not isinstance(value, dict):
        raise ConfigError([f"{path} is damaged (it holds no object); {what_to_do}"])
    return value


ROWS = (
    ("F1, sampled", "f1_sampled"),
    ("F1, sampled, mean over sources", "f1_sampled_macro"),
    ("F1, greedy", "f1_greedy"),
    ("F1, greedy, mean over sources", "f1_greedy_macro"),
    ("EM, greedy", "em_greedy"),
    ("EM, greedy, mean over sources", "em_greedy_macro"),
    ("format valid", "format_valid"),
    ("searches per question", "searches_per_question"),
)


def summary_table(summary: dict[str, Any]) -> Table:
    """Held-out scores before and after, gain by turn and time by phase."""
    table = Table(title=f"{summary['steps']} steps in {summary['wall_s'] / 60:.1f} min", title_justify="left")
    for heading in ("held-out questions", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading.startswith("held") else "right")
    before, after = summary.get("before"), summary.get("after")
    if before and after:
        for label, key in ROWS:
            if before.get(key) is None or after.get(key) is None:
                continue
            spread = after.get(f"{key}_se")
            error = "" if spread is None else f" ± {spread:.3f}"
            table.add_row(label, f"{before[key]:.3f}", f"{after[key]:.3f}{error}", f"{after[key] - before[key]:+.3f}")
        table.add_section()
    for turn, gain in enumerate(summary.get("gain_by_turn", []), start=1):
        table.add_row(f"mean gain of turn {turn}", f"{gain['first']:+.3f}", f"{gain['last']:+.3f}", f"{gain['last'] - gain['first']:+.3f}")
    table.add_section()
    for phase, seconds in summary["phases_s"].items():
        table.add_row(f"time: {phase}", "", f"{seconds:.1f} s", "")
    table.add_row("largest engine/trainer log-prob gap", "", f"{summary['max_logprob_gap']:.1e}", "")
    return table
