"""The second demo, from the package of a language model to a table: what `make quickstart-llm` runs.

    package ──igpo demo-model──> smollm2 ──igpo eval──> scores before anything
    questions ──igpo data demonstrations──> demonstrations ──igpo train (sft)──> policy, kept by a hash of all that made it
    policy ──igpo train (igpo)──> scores after the cold start and after RL, report.html

Every stage is a command that a user can run; each is printed before it runs, and a stage whose result is there is not run again. With
`model.path=FOLDER` among the settings the policy is the user's own, and nothing is cold-started.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from igpo_megatron.config.host import best_dtype, cpu_flags
from igpo_megatron.config.load import load
from igpo_megatron.observability.metrics import headline, outcomes
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.run_folder import folder_for, read_object, step_name
from igpo_megatron.types import Metric, RolloutGroup, UserError

SETTINGS = Path("examples/quickstart-llm/igpo.yaml")
COLD_START = Path("examples/quickstart-llm/coldstart.yaml")
FOLDER = Path("runs/quickstart-llm-start")
MODEL = FOLDER / "smollm2"
DEMONSTRATIONS = FOLDER / "demonstrations.parquet"
MAKE_DEMONSTRATIONS = ("--count", "1200", "--held-out", "0.05", "--seed", "0")

MEASURED = {"bf16": (45.0, 1.6e12), "fp32": (150.0, 2.0e11)}
"""Minutes of the whole demo on two cores, and floating-point operations per second of one of them in a product as the model has them."""

PATIENCE_MIN = 60.0
"""Where the demo lasts longer than this, fewer steps are offered beforehand."""


def main(settings: Annotated[list[str] | None, typer.Argument(help="Settings of the run, e.g. run.steps=5.")] = None) -> None:
    """Cold-start a language model, train it with IGPO, and print its held-out scores."""
    changes = settings or []
    evaluations: dict[str, Path] = {}
    if not any(change.startswith("model.path=") for change in changes):
        typer.echo(forecast())
        if not MODEL.exists():
            igpo("demo-model", "--out", str(MODEL))
        evaluations["as it comes"] = zero_shot()
        changes = [f"model.path={cold_started()}", *changes]
    igpo("train", str(SETTINGS), *changes)
    config = load(SETTINGS, changes)
    scores, steps = folder_for(config).eval, config.run.steps
    evaluations |= {"cold start": scores / f"{step_name(0)}.json", f"{steps} steps": scores / f"{step_name(steps)}.json"}
    console = Console()
    headlines = {name: headline(read_object(path, "remove it and run again")) for name, path in evaluations.items()}
    console.print(scores_table(headlines))
    for title, step in (("before", 0), ("after", steps)):
        console.print(f"\n{title} RL, answered greedily:", style="bold")
        console.print(transcript(scores, step, chosen(scores, steps)), markup=False, highlight=False, soft_wrap=True)


def igpo(*words: str) -> None:
    """Print and run an `igpo` command; its failure is ours."""
    typer.echo(f"\n$ igpo {' '.join(words)}")
    code = subprocess.run([sys.executable, "-m", "igpo_megatron", *words], check=False).returncode
    if code:
        raise typer.Exit(code)


def zero_shot() -> Path:
    """Scores of the model as the package has it, of few questions: it writes to the limit of every turn and never an answer."""
    out = FOLDER / "zero-shot"
    scores = out / f"{step_name(0)}.json"
    if not scores.exists():
        igpo("eval", str(SETTINGS), f"model.path={MODEL}", "eval.questions=60", "eval.samples=1", "--out", str(out))
    return scores


def cold_started() -> Path:
    """The Hugging Face folder of the policy after the cold start, made where no earlier one has the same origin."""
    digest = hashlib.sha256(" ".join(MAKE_DEMONSTRATIONS).encode())
    for file in (MODEL / "model.safetensors", SETTINGS, COLD_START):
        digest.update(file.read_bytes())
    policy = FOLDER / f"policy-{digest.hexdigest()[:12]}"
    if not policy.exists():
        if not DEMONSTRATIONS.exists():
            igpo("data", "demonstrations", str(SETTINGS), f"model.path={MODEL}", "--out", str(DEMONSTRATIONS), *MAKE_DEMONSTRATIONS)
        igpo("train", str(COLD_START))
        best = folder_for(load(COLD_START)).checkpoints / "best"
        igpo("convert", "megatron-to-hf", "--megatron", str(best), "--out", str(policy))
    return policy


def forecast() -> str:
    """How long the demo lasts on this machine, by one measured product of matrices."""
    dtype = best_dtype(cuda=False, flags=cpu_flags())
    minutes, rate = MEASURED[dtype]
    expected = minutes * rate / matmul_rate({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    fewer = "" if expected <= PATIENCE_MIN else '; fewer steps take less: make quickstart-llm ARGS="run.steps=5"'
    return f"the whole demo takes about {expected:.0f} minutes here, in {dtype}{fewer}"


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of one thread."""
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    a @ b
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.5:
        a @ b
        products += 1
    return products * 2 * 1024 * 576 * 1536 / (time.perf_counter() - started)


def scores_table(headlines: Mapping[str, Mapping[str, Any]]) -> Table:
    """One column per evaluation."""
    table = Table(title="held-out questions", title_justify="left")
    table.add_column("")
    for name in headlines:
        table.add_column(name, justify="right")
    *_, last = headlines.values()
    for row in outcomes(last, last):
        cells = [next(r["sides"][0] for r in outcomes(scores, last) if r["label"] == row["label"]) for scores in headlines.values()]
        table.add_row(row["label"], *("" if score is None else f"{score:.3f}" + (f" ± {e:.3f}" if e else "") for score, e in cells))
    return table


def groups_of(scores: Path, step: int) -> Iterator[RolloutGroup]:
    """Greedy trajectories of an evaluation, by question."""
    for _, groups in read_rollouts(scores / f"{step_name(step)}_greedy.parquet"):
        yield from groups


def chosen(scores: Path, steps: int) -> str:
    """The id of a question that was answered wrongly before and rightly after; the first of all where there is none."""
    right = {step: {group.prompt.id for group in groups_of(scores, step) if _f1(group) == 1.0} for step in (0, steps)}
    gained = sorted(right[steps] - right[0]) or sorted(right[steps])
    return gained[0] if gained else next(groups_of(scores, steps)).prompt.id


def _f1(group: RolloutGroup) -> float:
    return group.trajectories[0].reward_parts.get(Metric.F1, 0.0)


def transcript(scores: Path, step: int, question: str) -> str:
    """What the policy wrote and what the tool answered, from the question on."""
    group = next((group for group in groups_of(scores, step) if group.prompt.id == question), None)
    if group is None:
        raise UserError(f"question {question} is not in the evaluation of step {step}; remove {scores} and run again")
    nodes = [group.nodes[index] for index in group.trajectories[0].path[1:]]
    said: Sequence[str] = [node.text.strip() for node in nodes]
    return "\n".join([f"Question: {group.prompt.question}  (answer: {group.prompt.answers[0]})", *said])


if __name__ == "__main__":
    typer.run(main)
