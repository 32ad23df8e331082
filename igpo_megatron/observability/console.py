"""What a run shows while it goes on: on a terminal a display in place, elsewhere a line for every long phase; a line per step on both."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from igpo_megatron.observability.metrics_file import STEP_PHASES, Phase
from igpo_megatron.types import EVALUATION_KINDS, Metric, evaluated, over_sources

ANNOUNCED: tuple[Phase, ...] = ("startup", "eval", "checkpoint")
"""Phases outside of steps: without a terminal their start and end are printed."""

PROGRESS_LINE_S = 10.0
"""Without a terminal a fraction is printed at most this often."""

RATE_STEPS = 10
"""The ETA extrapolates the last steps: early ones are slower (first calls compile)."""

SHOWN = {
    Metric.REWARD: "reward {:+.3f}",
    Metric.GAIN: "gain {:+.3f}",
    Metric.F1: "F1 {:.3f}",
    Metric.NLL: "loss {:.3f}",
    Metric.HELD_OUT_NLL: "held-out loss {:.3f}",
    Metric.TOKENS_PER_S: "{:,.0f} tok/s",
    Metric.SKIPPED: "skipped {:.0f}",
    Metric.CRASHED: "crashed {:.1%}",
}
"""Metrics of a step that the console shows, if measured."""

TROUBLE = (Metric.SKIPPED, Metric.CRASHED)
"""Those of them that are shown only if not zero."""

SHOWN_EVAL = {
    Metric.F1: "F1 {:.3f}",
    Metric.EM: "EM {:.3f}",
    over_sources(Metric.F1): "F1 {:.3f}",
    over_sources(Metric.EM): "EM {:.3f}",
    Metric.FORMAT_OK: "format {:.2f}",
}


class Display:
    """The console of one run."""

    def __init__(self, name: str, total_steps: int, step: int, row: Mapping[str, Any], console: Console) -> None:
        """`step`: the last one that is done; `row`: its metrics."""
        self._name, self._total_steps, self._step, self._console = name, total_steps, step, console
        self._live: Live | None = None
        self._phase: Phase | None = None
        self._phase_since = time.monotonic()
        self._detail: float | str | None = None
        self._printed_detail_at = -math.inf
        self._row = row
        self._step_ends = deque([(step, time.monotonic())], maxlen=RATE_STEPS + 1)
        self._unshown_s = 0.0
        """Time of steps that no printed line has included yet."""

    def open(self) -> None:
        """Begin to display in place, on a terminal."""
        if self._console.is_terminal:
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def close(self) -> None:
        """End the display in place. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """Print a line above the display."""
        self._console.print(Text(text), soft_wrap=True)

    def phase_began(self, name: Phase) -> None:
        """`name` is the innermost phase now."""
        self._go_to(name)
        if name in ANNOUNCED:
            self._plain_line(f"{name} ...")

    def phase_ended(self, name: Phase, seconds: float, outer: Phase | None) -> None:
        """`outer` is the innermost phase now; None outside all phases."""
        self._go_to(outer)
        if name in ANNOUNCED:
            self._plain_line(f"{name} took {_duration(seconds)}")
        if name == "startup" and self._console.is_terminal:
            self.message(f"startup took {_duration(seconds)}")

    def progress(self, state: float | str) -> None:
        """Show how far the innermost phase is: a fraction in [0, 1], or what is being done."""
        assert self._phase is not None, "progress belongs inside a phase"
        if isinstance(state, str) and state != self._detail:
            self._plain_line(f"{self._phase}: {state}")
        elif isinstance(state, float) and time.monotonic() - max(self._printed_detail_at, self._phase_since) >= PROGRESS_LINE_S:
            self._printed_detail_at = time.monotonic()
            self._plain_line(f"{self._phase}: {state:.0%}")
        self._detail = state

    def logged(self, step: int, metrics: Mapping[str, float], row: Mapping[str, Any], times: Mapping[str, float]) -> None:
        """Print the new metrics of a step. `row`: all of its metrics; `times`: seconds by phase since the last call."""
        self._step, self._row = step, row
        if step == self._step_ends[-1][0]:
            self._step_ends.pop()  # now its evaluation has ended, too, whose time must not count as that of the next step
        self._step_ends.append((step, time.monotonic()))
        self._unshown_s += sum(seconds for name, seconds in times.items() if name in STEP_PHASES)
        for line in self._summaries(step, metrics):
            self._console.print(line, soft_wrap=True)

    def render(self) -> RenderableType:
        """The display in place: progress of the run, then the current phase and the latest numbers."""
        bar = Table.grid(padding=(0, 1), expand=False)
        eta = self._eta_s()
        bar.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=self._total_steps, completed=self._step, width=28),
            Text(f"step {self._step}/{self._total_steps}"),
            Text(f"ETA {roughly(eta)}" if eta else "", style="dim"),
        )
        now = Text()
        if self._phase is not None:
            now.append(self._phase, style="cyan")
            if self._detail is not None:
                now.append(f" {self._detail:.0%}" if isinstance(self._detail, float) else f": {self._detail}")
            now.append(f" {_duration(time.monotonic() - self._phase_since)}", style="dim")
        for key, form in SHOWN.items():
            if text := _shown(self._row, key, form):
                now.append(f"  {text}")
        return Group(bar, now)

    def _go_to(self, phase: Phase | None) -> None:
        self._phase, self._detail, self._phase_since = phase, None, time.monotonic()

    def _plain_line(self, text: str) -> None:
        """Print a line where there is no display in place, which shows the same."""
        if not self._console.is_terminal:
            self.message(f"{self._name}: {text}")

    def _summaries(self, step: int, metrics: Mapping[str, float]) -> list[Text]:
        """Lines printed for a step: one for training and one per kind of evaluation, broken between figures where too long."""
        found = []
        head = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        training = [text for key, form in SHOWN.items() if (text := _shown(metrics, key, form))]
        if training:
            seconds, self._unshown_s = self._unshown_s, 0.0
            eta = None if self._console.is_terminal else self._eta_s()  # the display in place has it
            parts = [*training, f"{seconds:.1f} s", *([f"ETA {roughly(eta)}"] if eta else [])]
            found.append(Text(_broken(head, parts, self._console.width), no_wrap=True, overflow="ignore"))
        for kind in EVALUATION_KINDS:
            scores = {key: text for key, form in SHOWN_EVAL.items() if (text := _shown(metrics, evaluated(kind, key), form))}
            macro = "  ".join(scores.pop(key) for key in map(over_sources, (Metric.F1, Metric.EM)) if key in scores)
            if scores:
                parts = [scores.pop(key) for key in (Metric.F1, Metric.EM) if key in scores]
                parts += [f"over sources {macro}"] if macro and macro != "  ".join(parts) else []
                text = _broken(head, [f"held-out, {kind}:", *parts, *scores.values()], self._console.width)
                found.append(Text(text, style="bold", no_wrap=True, overflow="ignore"))
        return found

    def _eta_s(self) -> float | None:
        """Seconds to the last step at the recent pace; None before the first step or after the last."""
        (first, start), (last, end) = self._step_ends[0], self._step_ends[-1]
        if last == first or last >= self._total_steps:
            return None
        return (end - start) / (last - first) * (self._total_steps - last)


def _shown(metrics: Mapping[str, Any], key: str, form: str) -> str | None:
    """A metric for the console; None if absent, or a zero among TROUBLE."""
    value = metrics.get(key)
    return None if value is None or (key in TROUBLE and value == 0) else form.format(value)


def _broken(head: str, parts: Sequence[str], width: int) -> str:
    """`head` and parts in one line, or in several that fit `width`."""
    lines = [head]
    for part in parts:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append(" " * len(head))
        lines[-1] += f"  {part}"
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """0.4 s, 42 s, 3:07 min, 2:05 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{int(seconds // 60)}:{int(seconds % 60):02d} min" if seconds < 3600 else f"{minutes // 60}:{minutes % 60:02d} h"


def roughly(seconds: float) -> str:
    """About how long: 90 s, 4 min, 2.5 h."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
