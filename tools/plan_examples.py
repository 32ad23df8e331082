"""Write examples/sizes/: one configuration per model size, laid out by the planner, its numbers in comments.

python tools/plan_examples.py [--only 72b]     a few seconds each; no GPU, no weights
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from igpo_megatron.plan.command import plan_run
from igpo_megatron.plan.types import Placement, Workload

SIZES = Path(__file__).resolve().parents[1] / "examples" / "sizes"
WORKLOAD = Workload()
"""The IGPO paper's batch: 32 questions of 16 trajectories, contexts up to 32,768 tokens."""

PLACEMENT: Placement = "disaggregated"
"""Ranks and engines by turns on the same GPUs may be planned faster; that was not run on a GPU yet."""

EXAMPLES = {
    "qwen2.5_1.5b": ("Qwen2.5-1.5B-Instruct", 8),
    "qwen2.5_7b": ("Qwen2.5-7B-Instruct", 8),
    "qwen2.5_14b": ("Qwen2.5-14B-Instruct", 16),
    "qwen2.5_32b": ("Qwen2.5-32B-Instruct", 32),
    "qwen2.5_72b": ("Qwen2.5-72B-Instruct", 64),
    "qwen3_30b_a3b": ("Qwen3-30B-A3B", 32),
    "qwen3_235b_a22b": ("Qwen3-235B-A22B", 128),
}
"""File -> model, and H100 GPUs: the fewest whole machines, by powers of two, on which training has room for 32k tokens."""


def main(
    only: Annotated[str, typer.Option(help="Only files whose name holds this text.")] = "",
    folder: Annotated[Path, typer.Option(help="Where to write.")] = SIZES,
) -> None:
    """Plan and write every example."""
    for name, (model, gpus) in EXAMPLES.items():
        if only not in name:
            continue
        out = folder / f"{name}.yaml"
        if plan_run(
            model,
            gpus,
            workload=replace(WORKLOAD),
            out=out,
            rows=3,
            console=Console(stderr=True),
            placement=PLACEMENT,
            shown_out=f"examples/sizes/{out.name}",
        ):
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
