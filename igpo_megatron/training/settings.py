"""Settings of a run, of its evaluations, and of who shares the devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section, Threads


class Run(Section):
    """Folder, seed, length and device of a run."""

    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""

    folder: Path = Path("runs")
    """Parent of all run folders."""

    seed: NonNegativeInt = 0
    """Seed of question order, sampling and initial state."""

    steps: PositiveInt = 100
    """Training steps."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA when torch sees a GPU. `cpu` also works on a machine that has GPUs."""

    threads: Threads = "auto"
    """CPU threads of each rank, whatever OMP_NUM_THREADS says. `auto`: 1 on GPUs and for models below 20 M parameters; else the
    machine's cores shared by its ranks, or half of the cores where rollouts go on meanwhile (`rollout.max_staleness` above 0)."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest complete checkpoint of this run; `never` refuses a folder that already holds a run."""

    replay: Path | None = None
    """Train from this rollout file (parquet) without engines: RL on recorded rollouts, or supervised on demonstrations."""

    stop_after: Literal["none", "rollout"] = "none"
    """`rollout` writes the rollouts of each step and trains nothing: the other half of `replay`."""

    def problems(self) -> Iterator[str]:
        if self.replay is not None and self.stop_after == "rollout":
            yield "run.replay trains from recorded rollouts and run.stop_after=rollout writes new ones; set only one of them"
        if self.replay is not None and not self.replay.is_file():
            yield f"run.replay={self.replay}: no such file; expected a rollout file (parquet) of an earlier run"


class Placement(Section):
    """Whether engines and ranks share devices. `parallel` and `rollout.engine` set how many devices each has."""

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    """`disaggregated`: the engines have devices, or nodes, of their own. `colocated`: they take turns with the ranks on the same GPUs; the
    engines sleep while the policy trains, and the policy waits in host memory while they roll out."""

    sleep_level: Literal[1, 2] = 2
    """What a sleeping engine does with its weights: keeps them in host memory (1), or drops them (2), since new ones come anyway."""

    leak_mib: PositiveFloat = 1024
    """A warning is given when the memory in use at the end of a phase has grown by more than this over three steps."""


class Eval(Section):
    """Held-out evaluation."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only with `at_ends`."""

    at_ends: bool = False
    """Evaluate before the first and after the last step."""

    questions: NonNegativeInt = 0
    """Questions used, the first of a fixed shuffle; 0 uses all."""

    samples: NonNegativeInt = 1
    """Samples per question at `rollout.temperature` (pass@k needs k of them); 0 for none."""

    greedy: bool = True
    """Also answer every question once at temperature 0."""

    @property
    def wanted(self) -> bool:
        """A training run evaluates."""
        return self.every > 0 or self.at_ends

    def problems(self) -> Iterator[str]:
        if self.wanted and not self.samples and not self.greedy:
            yield "eval.samples=0 and eval.greedy=false leave nothing to evaluate; set one of them"
