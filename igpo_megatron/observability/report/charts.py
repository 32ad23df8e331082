"""The report's curves: its panels, their points, and limits on the size of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from igpo_megatron.observability.metrics_file import PHASES, STEP_PHASES
from igpo_megatron.types import EVALUATION_KINDS, SEARCH, Metric, evaluated, gain_of_turn, of_tool, standard_error, without_replay


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run the page shows."""

    groups: int = 20
    """Questions per rollout file, the first ones."""

    samples: int = 16
    """Trajectories per question, the first ones."""

    action_tokens: int = 600
    """Sampled tokens shown per turn."""

    text_chars: int = 3000
    """Characters shown per prompt and search result."""

    file_bytes: int = 800_000
    """JSON size of the questions shown per file; the first question is always kept."""

    points: int = 400
    """Points per curve; in longer runs neighbouring steps are averaged."""


STANDARD = Limits()
"""A page of a few megabytes."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel of curves."""

    title: str
    series: Mapping[str, str]
    """Metric -> label. A metric ending in `*` stands for all with that prefix, and `*` in the label for the rest of their names."""

    note: str = ""
    log: bool = False
    smooth: bool = False
    """Draw a moving average over the raw line, for values that are noisy because a step has few questions."""


CHARTS = (
    Chart("Held-out F1", {evaluated(kind, Metric.F1): kind for kind in EVALUATION_KINDS}, "bars: standard error over questions"),
    Chart("Reward", {Metric.REWARD: "mean reward"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("F1 and exact match", {Metric.F1: "F1", Metric.EM: "exact match"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("Information gain per turn", {Metric.GAIN: "all turns", gain_of_turn("*"): "turn *"}, "mean rise in the answer's value"),
    Chart(
        "Where gains come from",
        {Metric.GAIN_EVIDENCE: "the tool result", Metric.GAIN_REASONING: "own reasoning"},
        "reward.evidence: the value with the newest result hidden lies between the two",
    ),
    Chart(
        "Format-valid share",
        {Metric.FORMAT_OK: "training"} | {evaluated(kind, Metric.FORMAT_OK): f"held-out, {kind}" for kind in EVALUATION_KINDS},
    ),
    Chart("Value before the first turn", {Metric.VALUE_0: "mean log-prob of the answer"}),
    Chart("Entropy", {Metric.ENTROPY: "entropy"}, "nats per sampled token"),
    Chart(
        "Log-prob gap, engine vs trainer",
        {
            Metric.LOGPROB_GAP_MEAN: "mean",
            Metric.LOGPROB_GAP_MAX: "largest",
            without_replay(Metric.LOGPROB_GAP_MAX): "largest without routing replay",
            Metric.CANARY_GAP: "canary after sync",
        },
        "nats, log scale",
        log=True,
    ),
    Chart(
        "Branching",
        {
            Metric.BRANCHED: "decisions that branched",
            Metric.BRANCH_ENTROPY: "entropy behind results",
            Metric.BRANCH_SPREAD: "std of values behind results",
            Metric.SHARED_TOKENS: "sampled tokens shared",
            Metric.STOPPED: "trajectories asked for their answer",
        },
        "shares; entropy in units of rollout.branching",
    ),
    Chart("Gradient norm", {Metric.GRAD_NORM: "gradient norm"}, "before clipping"),
    Chart("Loss", {Metric.LOSS: "loss", Metric.NLL: "negative log-likelihood", Metric.HELD_OUT_NLL: "the same, held out"}),
    Chart(
        "Distance to other policies",
        {Metric.KL_OLD: "KL to old policy", Metric.KL_REF: "KL to reference", Metric.CLIP_FRACTION: "clipped share"},
    ),
    Chart(
        "Turns and tool calls",
        {Metric.TURNS: "turns", Metric.SEARCHES: "searches", Metric.VISITS: "visits", Metric.PYTHON_CALLS: "python calls"},
        "per trajectory",
    ),
    Chart(
        "How searches ended",
        {of_tool(SEARCH, end): end.replace("_", " ") for end in ("ok", "empty", "error", "timeout", "rate_limited")}
        | {of_tool(SEARCH, "cached"): "from the cache"},
        "queries per step, those from the cache included",
    ),
    Chart(
        "Tool latency",
        {of_tool(tool, f"p{share}_s"): f"{tool}, p{share}" for tool in (SEARCH, "visit", "python") for share in (50, 95)},
        "seconds, without answers from the cache; log scale",
        log=True,
    ),
    Chart("Sampled tokens per trajectory", {Metric.RESPONSE_TOKENS: "tokens"}),
    Chart(
        "Without a training signal",
        {
            Metric.FAILED: "failed trajectories",
            Metric.TRUNCATED: "truncated trajectories",
            Metric.ZERO_STD_GROUPS: "groups with equal rewards",
            Metric.CRASHED: "crashed trajectories",
        },
        "shares",
    ),
    Chart("Tokens per second", {Metric.TOKENS_PER_S: "tokens/s"}, "all tokens of a step over its time"),
    Chart("Learning rate", {Metric.LR: "learning rate"}),
)

STEP_TIME = Chart("Step time by phase", {}, "seconds; evaluation and start-up are not part of a step")


def charts_of(rows: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Panels that have at least one value; the step time by phase comes second."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = []
    for chart in CHARTS:
        series = [
            {"label": label, "colour": index, "points": points}
            for index, (name, label) in enumerate(_expand(chart.series, names))
            if (points := _points(rows, name, limits.points))
        ]
        if series:
            panels.append(_panel(chart, series))
    timed = [row for row in rows if row["phases_s"].get("train")]
    stacked = [
        {"label": phase, "colour": PHASES.index(phase), "points": times}
        for phase in (*STEP_PHASES, "checkpoint")  # start-up and evaluation would dwarf them
        if (times := _bins([(row["step"], row["phases_s"].get(phase, 0.0)) for row in timed], limits.points)) and any(y for _, y in times)
    ]
    if stacked:
        panels.insert(1, _panel(STEP_TIME, stacked, stacked=True))
    return panels


def _panel(chart: Chart, series: list[dict[str, Any]], *, stacked: bool = False) -> dict[str, Any]:
    return {"title": chart.title, "note": chart.note, "log": chart.log, "smooth": chart.smooth, "stacked": stacked, "series": series}


def _expand(series: Mapping[str, str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(metric, label), with `*` expanded to the metrics that the run has logged."""
    for pattern, label in series.items():
        if not pattern.endswith("*"):
            yield pattern, label
            continue
        prefix = pattern[:-1]
        found = sorted((name for name in names if name.startswith(prefix)), key=lambda name: (len(name), name))
        yield from ((name, label.replace("*", name.removeprefix(prefix))) for name in found)


def _points(rows: Sequence[Mapping[str, Any]], name: str, limit: int) -> list[tuple[float, float, float | None]]:
    """(step, value, standard error or None) of a metric; steps where it is absent are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    errors = {row["step"]: row.get(standard_error(name)) for row in rows} if len(points) <= limit else {}
    return [(step, value, rounded(errors.get(int(step)))) for step, value in _bins(points, limit)]


def _bins(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means over neighbouring ones where there are more."""
    width = -(-len(points) // limit) or 1
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(chunk[0][0] if width == 1 else fmean(x for x, _ in chunk), float(f"{fmean(y for _, y in chunk):.5g}")) for chunk in chunks]


def rounded(value: float | None) -> float | None:
    """Rounded to four digits; None for a value that is not finite, which JSON cannot hold."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
