"""The report's curves: its panels, their points, and limits on the size of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from igpo_megatron.observability.metrics_file import PHASES, STEP_PHASES


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
    Chart("Held-out F1", {"eval/sampled/f1": "sampled", "eval/greedy/f1": "greedy"}, "bars: standard error over questions"),
    Chart("Reward", {"reward": "mean reward"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("F1 and exact match", {"f1": "F1", "em": "exact match"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("Information gain per turn", {"gain": "all turns", "gain_turn_*": "turn *"}, "rise in the answer's value, mean over turns"),
    Chart(
        "Where gains come from",
        {"gain_evidence": "the tool result", "gain_reasoning": "own reasoning"},
        "reward.evidence: the value with the newest result hidden lies between the two",
    ),
    Chart(
        "Format-valid share",
        {"format_ok": "training", "eval/sampled/format_ok": "held-out, sampled", "eval/greedy/format_ok": "held-out, greedy"},
    ),
    Chart("Value before the first turn", {"value_0": "mean log-prob of the answer"}),
    Chart("Entropy", {"entropy": "entropy"}, "nats per sampled token"),
    Chart(
        "Log-prob gap, engine vs trainer",
        {
            "logprob_gap_mean": "mean",
            "logprob_gap_max": "largest",
            "logprob_gap_max_free": "largest without routing replay",
            "canary_gap": "canary after sync",
        },
        "nats, log scale",
        log=True,
    ),
    Chart(
        "Branching",
        {
            "branched": "decisions that branched",
            "branch_entropy": "entropy behind results",
            "branch_spread": "std of values behind results",
            "shared_tokens": "sampled tokens shared",
            "stopped": "trajectories asked for their answer",
        },
        "shares; entropy in units of rollout.branching",
    ),
    Chart("Gradient norm", {"grad_norm": "gradient norm"}, "before clipping"),
    Chart("Loss", {"loss": "loss", "nll": "negative log-likelihood"}),
    Chart("Distance to other policies", {"kl_old": "KL to old policy", "kl_ref": "KL to reference", "clip_fraction": "clipped share"}),
    Chart(
        "Turns and tool calls",
        {"turns": "turns", "searches": "searches", "visits": "visits", "python_calls": "python calls"},
        "per trajectory",
    ),
    Chart(
        "How searches ended",
        {
            "search/ok": "ok",
            "search/empty": "empty",
            "search/error": "error",
            "search/timeout": "timeout",
            "search/rate_limited": "rate limited",
            "search/cached": "from the cache",
        },
        "queries per step, those from the cache included",
    ),
    Chart(
        "Tool latency",
        {
            "search/p50_s": "search, p50",
            "search/p95_s": "search, p95",
            "visit/p50_s": "visit, p50",
            "visit/p95_s": "visit, p95",
            "python/p50_s": "python, p50",
            "python/p95_s": "python, p95",
        },
        "seconds, without answers from the cache; log scale",
        log=True,
    ),
    Chart("Sampled tokens per trajectory", {"response_tokens": "tokens"}),
    Chart(
        "Without a training signal",
        {
            "failed": "failed trajectories",
            "truncated": "truncated trajectories",
            "zero_std_groups": "groups with equal rewards",
            "crashed": "crashed trajectories",
        },
        "shares",
    ),
    Chart("Tokens per second", {"tokens_per_s": "tokens/s"}, "all tokens of a step over its time"),
    Chart("Learning rate", {"lr": "learning rate"}),
)


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
            panels.append(
                {"title": chart.title, "note": chart.note, "log": chart.log, "smooth": chart.smooth, "stacked": False, "series": series}
            )
    timed = [row for row in rows if row["phases_s"].get("train")]
    stacked = [
        {"label": phase, "colour": PHASES.index(phase), "points": times}
        for phase in (*STEP_PHASES, "checkpoint")  # start-up and evaluation would dwarf them
        if (times := _bins([(row["step"], row["phases_s"].get(phase, 0.0)) for row in timed], limits.points)) and any(y for _, y in times)
    ]
    if stacked:
        note = "seconds; evaluation and start-up are not part of a step"
        panels.insert(1, {"title": "Step time by phase", "note": note, "log": False, "smooth": False, "stacked": True, "series": stacked})
    return panels


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
    errors = {row["step"]: row.get(f"{name}_se") for row in rows} if len(points) <= limit else {}
    return [(step, value, rounded(errors.get(int(step)))) for step, value in _bins(points, limit)]


def _bins(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means over neighbouring ones where there are more."""
    width = -(-len(points) // limit) or 1
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(chunk[0][0] if width == 1 else fmean(x for x, _ in chunk), float(f"{fmean(y for _, y in chunk):.5g}")) for chunk in chunks]


def rounded(value: float | None) -> float | None:
    """Rounded to four digits; None for a value that is not finite, which JSON cannot hold."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
