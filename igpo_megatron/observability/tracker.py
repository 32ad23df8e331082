"""Progress and metrics of a run: time by phase, and every step's numbers to metrics.jsonl, console and Weights & Biases.

with Tracker(folder, config.track, name=config.run.name, total_steps=40) as tracker:
    with tracker.phase("startup"):
        tracker.progress("starting engine")
    for step in range(1, 41):
        with tracker.phase("rollout"): ...
        tracker.log(step, {"reward": 0.31, "f1": 0.42})
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from igpo_megatron.observability.console import Display
from igpo_megatron.observability.memory_ledger import MemoryLedger
from igpo_megatron.observability.metrics_file import PHASES, MetricsFile, Phase
from igpo_megatron.observability.settings import Track
from igpo_megatron.observability.wandb_run import start_wandb


class Tracker:
    """Metrics of one run. Only the main rank should own one that is not `quiet`."""

    def __init__(
        self,
        folder: Path,
        config: Track,
        *,
        name: str,
        total_steps: int,
        resumed_step: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        memory: MemoryLedger | None = None,
    ):
        """Continue `folder/metrics.jsonl` after `resumed_step`, the last step that the loaded checkpoint contains (0: a new run).

        Rows of later steps are dropped, since these steps will run again. `quiet` keeps timers only: no file, no console, no wandb.
        `memory` records the end of every phase.
        """
        self.step = resumed_step
        self._memory = memory
        self._stack: list[Phase] = []
        self._since = time.monotonic()
        self._times: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._file: MetricsFile | None = None
        self._wandb: Any = None
        if quiet:
            console = Console(quiet=True, force_terminal=False)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(folder / "metrics.jsonl", resumed_step)
            self._totals = self._file.totals
            self._wandb = start_wandb(folder, config, name)
        self._display = Display(name, total_steps, resumed_step, self._file.row if self._file else {}, console or Console(highlight=False))

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time the block. Phases may nest; time counts for the innermost one only, so that phases add up to wall time."""
        self._charge()
        self._stack.append(name)
        self._display.phase_began(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            if self._memory is not None:
                self._memory.note(name)
            self._display.phase_ended(name, time.monotonic() - started, self._stack[-1] if self._stack else None)

    def progress(self, state: float | str) -> None:
        """Report progress within the current phase: a fraction in [0, 1], or what is being done, e.g. "starting engine"."""
        self._display.progress(state)

    def memory(self) -> dict[str, float]:
        """Phase -> MiB that this rank had in use at its end, since the last call; leaks are printed. Empty without a ledger."""
        if self._memory is None:
            return {}
        found = self._memory.step_ended()
        for leak in self._memory.leaks():
            self.message(f"warning: {leak}")
        return found

    def phases_total(self) -> dict[str, float]:
        """Seconds per phase over the complete run, including the part before a resume."""
        self._charge()
        names = [name for name in PHASES if name in self._totals or name in self._times]
        return {name: self._totals.get(name, 0.0) + self._times.get(name, 0.0) for name in names}

    def _charge(self) -> None:
        """Add the time since the last call to the innermost phase."""
        now = time.monotonic()
        if self._stack:
            name = self._stack[-1]
            self._times[name] = self._times.get(name, 0.0) + now - self._since
        self._since = now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step with the phase times since the last call.

        Called again for the same step (an evaluation after it, say), the new values join that step's row. Steps never go back.
        A value that is not finite is written as null: JSON has no NaN.
        """
        assert step >= self.step, f"step {step} after step {self.step}"
        self._totals = self.phases_total()
        times, self._times = self._times, {}
        self.step = step
        if self._file is None:
            return
        row = self._file.write(step, metrics, times)
        if self._wandb is not None:
            self._wandb.log({**metrics, **{f"phase_s/{name}": seconds for name, seconds in times.items()}}, step=step)
        self._display.logged(step, metrics, row, times)

    def message(self, text: str) -> None:
        """Print a line above the live display."""
        self._display.message(text)

    @contextmanager
    def shows_log(self, name: str) -> Iterator[None]:
        """Inside, records of this logger and its children from INFO on are printed like messages."""
        handler = logging.Handler()
        handler.emit = lambda record: self.message(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger(name)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def __enter__(self) -> Self:
        self._display.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """End the live display and the wandb run. A second call does nothing."""
        self._display.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if failed else 0)
            self._wandb = None
