"""Progress and metrics of a run: one JSON line per step, a live console, Weights & Biases, and time by phase.

with Tracker(folder, config.track, name=config.run.name, total_steps=40) as tracker:
    with tracker.phase("startup"):
        tracker.progress("starting engine")
    for step in range(1, 41):
        with tracker.phase("rollout"): ...
        tracker.log(step, {"reward": 0.31, "f1": 0.42})
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from igpo_megatron.observability.memory_ledger import MemoryLedger
from igpo_megatron.observability.settings import Track
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

Phase = Literal["startup", "rollout", "score", "advantage", "train", "sync", "eval", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order in which a run meets them."""

ANNOUNCED: tuple[Phase, ...] = ("startup", "eval", "checkpoint")
"""Phases outside of steps: without a terminal their start and end are printed."""

STEP_PHASES: tuple[Phase, ...] = ("rollout", "score", "advantage", "train", "sync")
"""Phases that count in a step's printed seconds."""

PROGRESS_LINE_S = 10.0
"""Without a terminal a fraction is printed at most this often."""

RATE_STEPS = 10
"""The ETA extrapolates the last steps: early ones are slower (first calls compile)."""


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
        self.folder = folder
        self.name = name
        self.total_steps = total_steps
        self.step = resumed_step
        self.quiet = quiet
        self._memory = memory
        self._stack: list[Phase] = []
        self._since = time.monotonic()
        self._phase_since = self._since
        self._detail: float | str | None = None
        self._printed_detail_at = -math.inf
        self._times: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._row: dict[str, Any] | None = None
        self._row_offset = 0
        self._unshown_s = 0.0
        """Time of steps that no printed line has included yet."""

        self._step_ends: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS + 1)
        self._console = console or Console(highlight=False)
        self._live: Live | None = None
        self._wandb: Any = None
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._continue_file(resumed_step)
        self._step_ends.append((resumed_step, time.monotonic()))
        if config.wandb != "off":
            self._wandb = _start_wandb(folder, config, name)

    # ---- timers

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time the block. Phases may nest; time counts for the innermost one only, so that phases add up to wall time."""
        self._charge()
        self._stack.append(name)
        self._enter_phase()
        if name in ANNOUNCED:
            self._plain_line(f"{name} ...")
        started = time.monotonic()
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            self._enter_phase()
            if self._memory is not None:
                self._memory.note(name)
            if name in ANNOUNCED:
                self._plain_line(f"{name} took {_duration(time.monotonic() - started)}")
            if name == "startup" and self._console.is_terminal:
                self.message(f"startup took {_duration(time.monotonic() - started)}")

    def progress(self, state: float | str) -> None:
        """Report progress within the current phase: a fraction in [0, 1], or what is being done, e.g. "starting engine"."""
        assert self._stack, "progress belongs inside a phase"
        if isinstance(state, str) and state != self._detail:
            self._plain_line(f"{self._stack[-1]}: {state}")
        elif isinstance(state, float) and time.monotonic() - max(self._printed_detail_at, self._phase_since) >= PROGRESS_LINE_S:
            self._printed_detail_at = time.monotonic()
            self._plain_line(f"{self._stack[-1]}: {state:.0%}")
        self._detail = state

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

    def _enter_phase(self) -> None:
        self._detail = None
        self._phase_since = time.monotonic()

    # ---- metrics

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step with the phase times since the last call.

        Called again for the same step (an evaluation after it, say), the new values join that step's row. Steps never go back.
        A value that is not finite is written as null: JSON has no NaN.
        """
        assert step >= self.step, f"step {step} after step {self.step}"
        self._charge()
        times, self._times = self._times, {}
        for name, seconds in times.items():
            self._totals[name] = self._totals.get(name, 0.0) + seconds
        self.step = step
        if self.quiet:
            return
        if step == self._step_ends[-1][0]:
            self._step_ends.pop()  # now its evaluation has ended, too, whose time must not count as that of the next step
        self._step_ends.append((step, time.monotonic()))
        self._write(step, metrics, times)
        self._unshown_s += sum(seconds for name, seconds in times.items() if name in STEP_PHASES)
        if self._wandb is not None:
            self._wandb.log({**metrics, **{f"phase_s/{name}": seconds for name, seconds in times.items()}}, step=step)
        for line in self._summaries(step, metrics):
            self._console.print(line, soft_wrap=True)

    def message(self, text: str) -> None:
        """Print a line above the live display."""
        if not self.quiet:
            self._console.print(Text(text), soft_wrap=True)

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

    def _write(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        """Append the step's row, or replace the last row if it belongs to the same step."""
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3), "phases_s": {}}
        with self._path.open("r+b") as file:
            if self._row is not None and self._row["step"] == step:
                row = {**self._row, "time": row["time"]}
                file.seek(self._row_offset)
            else:
                self._row_offset = file.seek(0, os.SEEK_END)
            row["phases_s"] = {
                name: round(row["phases_s"].get(name, 0.0) + times.get(name, 0.0), 4) for name in {**row["phases_s"], **times}
            }
            row.update((name, value if math.isfinite(value) else None) for name, value in metrics.items())
            file.write(_line(row))
            file.truncate()
        self._row = row

    @property
    def _path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _continue_file(self, resumed_step: int) -> None:
        """Keep the rows of steps up to `resumed_step`; the file is replaced in one go."""
        rows = read_metrics(self._path) if self._path.exists() else []
        kept = [row for row in rows if row["step"] <= resumed_step]
        with whole(self._path) as part:
            part.write_bytes(b"".join(map(_line, kept)))
        if kept:
            self._row = kept[-1]
            self._row_offset = self._path.stat().st_size - len(_line(kept[-1]))
        self._totals = sum_phases(kept)

    # ---- console

    def __enter__(self) -> Self:
        if not self.quiet and self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """End the live display and the wandb run. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if failed else 0)
            self._wandb = None

    def _plain_line(self, text: str) -> None:
        """Print a line where there is no live display, which shows the same in place."""
        if not self.quiet and not self._console.is_terminal:
            self._console.print(Text(f"{self.name}: {text}"), soft_wrap=True)

    def _summaries(self, step: int, metrics: Mapping[str, float]) -> list[Text]:
        """Lines printed for a step: one for training and one per kind of evaluation, broken between figures where too long."""
        found = []
        head = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        training = [text for key, form in SHOWN.items() if (text := _shown(metrics, key, form))]
        if training:
            seconds, self._unshown_s = self._unshown_s, 0.0
            eta = None if self._console.is_terminal else self._eta_s()  # the live display has it
            parts = [*training, f"{seconds:.1f} s", *([f"ETA {_roughly(eta)}"] if eta else [])]
            found.append(Text(_broken(head, parts, self._console.width), no_wrap=True, overflow="ignore"))
        for mode in ("sampled", "greedy"):
            scores = {key: text for key, form in SHOWN_EVAL.items() if (text := _shown(metrics, f"eval/{mode}/{key}", form))}
            macro = "  ".join(scores.pop(key) for key in ("macro_f1", "macro_em") if key in scores)
            if scores:
                parts = [scores.pop(key) for key in ("f1", "em") if key in scores]
                parts += [f"over sources {macro}"] if macro and macro != "  ".join(parts) else []
                text = _broken(head, [f"held-out, {mode}:", *parts, *scores.values()], self._console.width)
                found.append(Text(text, style="bold", no_wrap=True, overflow="ignore"))
        return found

    def _eta_s(self) -> float | None:
        """Seconds to the last step at the recent pace; None before the first step or after the last."""
        (first, start), (last, end) = self._step_ends[0], self._step_ends[-1]
        if last == first or last >= self.total_steps:
            return None
        return (end - start) / (last - first) * (self.total_steps - last)

    def _render(self) -> RenderableType:
        """The live display: progress of the run, then the current phase and the latest numbers."""
        bar = Table.grid(padding=(0, 1), expand=False)
        eta = self._eta_s()
        bar.add_row(
            Text(self.name, style="bold"),
            ProgressBar(total=self.total_steps, completed=self.step, width=28),
            Text(f"step {self.step}/{self.total_steps}"),
            Text(f"ETA {_roughly(eta)}" if eta else "", style="dim"),
        )
        now = Text()
        if self._stack:
            now.append(self._stack[-1], style="cyan")
            if self._detail is not None:
                now.append(f" {self._detail:.0%}" if isinstance(self._detail, float) else f": {self._detail}")
            now.append(f" {_duration(time.monotonic() - self._phase_since)}", style="dim")
        for key, form in SHOWN.items():
            if text := _shown(self._row or {}, key, form):
                now.append(f"  {text}")
        return Group(bar, now)


SHOWN = {
    "reward": "reward {:+.3f}",
    "gain": "gain {:+.3f}",
    "f1": "F1 {:.3f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "skipped": "skipped {:.0f}",
    "crashed": "crashed {:.1%}",
}
"""Metrics of a step that the console shows, if measured."""

TROUBLE = ("skipped", "crashed")
"""Those of them that are shown only if not zero."""

SHOWN_EVAL = {
    "f1": "F1 {:.3f}",
    "em": "EM {:.3f}",
    "macro_f1": "F1 {:.3f}",
    "macro_em": "EM {:.3f}",
    "format_ok": "format {:.2f}",
}


def _shown(metrics: Mapping[str, Any], key: str, form: str) -> str | None:
    """A metric for the console; None if absent, or a zero among TROUBLE."""
    value = metrics.get(key)
    if value is None or (key in TROUBLE and value == 0):
        return None
    return form.format(value)


def _broken(head: str, parts: Sequence[str], width: int) -> str:
    """`head` and parts in one line, or in several that fit `width`."""
    lines = [head]
    for part in parts:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append(" " * len(head))
        lines[-1] += f"  {part}"
    return "\n".join(lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order: {"step": int, "time": unix seconds, "phases_s": {phase: seconds}, metric: float or None}.

    An incomplete last line, left by a killed run, is ignored. Raises UserError for any other line that is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); remove the line, or move the file away to start a new one"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}, line {number}: expected an object with an integer 'step', found {line[:80]!r}; remove the line")
        rows.append(row)
    return rows


def sum_phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds per phase over metric rows, in the order of PHASES."""
    times = [row["phases_s"] for row in rows if "phases_s" in row]
    return {name: sum(seconds.get(name, 0.0) for seconds in times) for name in PHASES if any(name in seconds for seconds in times)}


def public_config(values: Any, key: str = "") -> Any:
    """A configuration fit to be shown: values of secret keys and credentials inside URLs become `***`.

    The schema stores no secrets, only names of environment variables (`*_env`), which stay; this is a second safeguard.
    """
    if isinstance(values, dict):
        return {name: public_config(value, name) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [public_config(value, key) for value in values]
    if isinstance(values, str):
        if SECRET_KEY.search(key):
            return "***"
        return URL_QUERY.sub(r"\1?***", URL_USER.sub(r"\1***@", values))
    return values


SECRET_KEY = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/?#\s]+@", re.IGNORECASE)
URL_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^?#\s]*)\?\S+", re.IGNORECASE)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _duration(seconds: float) -> str:
    """0.4 s, 42 s, 3:07 min, 2:05 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min" if seconds < 3600 else f"{minutes // 60}:{minutes % 60:02d} h"


def _roughly(seconds: float) -> str:
    """An estimate: 90 s, 4 min, 2.5 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _start_wandb(folder: Path, config: Track, name: str) -> Any:
    """A wandb run inside the run folder. Only with a key is anything uploaded: metrics and the public configuration."""
    # wandb reads these at import: its caches stay in the run folder, and crash reports are not sent.
    for variable, value in {
        "WANDB_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb" / "config"),
        "WANDB_DATA_DIR": str(folder / "wandb" / "data"),
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        os.environ[variable] = value
    import wandb

    online = config.wandb == "online" and bool(os.environ.get("WANDB_API_KEY"))
    id_file = folder / "wandb" / "run_id"
    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(secrets.token_hex(4))
    resolved = folder / "config.json"
    return wandb.init(
        project=config.project,
        name=name,
        id=id_file.read_text(),
        resume="allow" if online else None,
        dir=folder,
        mode="online" if online else "offline",
        config=public_config(json.loads(resolved.read_text(encoding="utf-8"))) if resolved.exists() else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )
