"""The head of the report: facts about the run, and its scores before and after training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from igpo_megatron.observability.console import roughly
from igpo_megatron.observability.metrics import headline, max_gap, outcomes
from igpo_megatron.observability.metrics_file import sum_phases
from igpo_megatron.types import Metric


def value_at(values: Mapping[str, Any], dotted: str) -> Any:
    """A value of a nested mapping; None if missing, as in a configuration of another version."""
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def facts_of(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(label, value) pairs for the head of the page; unknown ones are left out."""
    at = partial(value_at, config)
    steps = rows[-1]["step"] if rows else None
    gap = summary["max_logprob_gap"] if summary else max_gap(rows)
    skipped = [row[Metric.SKIPPED] for row in rows if row.get(Metric.SKIPPED) is not None]
    wall = summary["wall_s"] if summary else sum(sum_phases(rows).values())
    facts = [
        ("Policy", at("model.path") and Path(at("model.path")).name),
        ("Algorithm", at("advantage.name") and f"{at('advantage.name')}, {at('loss.name')} loss"),
        ("Gain", at("reward.gain")),
        ("Steps", steps is not None and f"{steps} of {at('run.steps')}" if at("run.steps") else steps),
        ("Per step", at("rollout.prompts_per_step") and f"{at('rollout.prompts_per_step')} questions x {at('rollout.samples_per_prompt')}"),
        ("Ranks", at("parallel.tensor") and _layout(at)),
        ("Engines", at("rollout.engine.count") and _engines(at)),
        ("Precision", at("model.dtype") and f"{at('model.dtype')} on {at('run.device')}"),
        ("Learning rate", at("optim.lr")),
        ("Seed", at("run.seed")),
        ("Time in phases", roughly(wall) if wall else None),
        ("Skipped updates", f"{sum(skipped):.0f}" if skipped else None),
        ("Largest log-prob gap", None if gap is None else f"{gap:.1e}"),
    ]
    return [(label, str(value)) for label, value in facts if value is not None and value is not False]


def _engines(at: Callable[[str], Any]) -> str:
    if at("rollout.engine.backend") == "torch":
        return "transformers on the main rank"
    return f"{at('rollout.engine.count')} vLLM, TP {at('rollout.engine.tensor')}"


def _layout(at: Callable[[str], Any]) -> str:
    context = f" · CP {at('parallel.context')}" if (at("parallel.context") or 1) > 1 else ""
    data = f" · DP {at('parallel.data')}" if at("parallel.data") else ""
    return f"TP {at('parallel.tensor')}{context} · PP {at('parallel.pipeline')}{data}"


def _ends(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Held-out scores before and after training (or so far), under the names of summary.json; empty where there are none."""
    if summary:
        return summary.get("before") or {}, summary.get("after") or {}
    if not evals:
        return {}, {}
    return headline(evals[0]), headline(evals[-1]) if len(evals) > 1 else {}


def outcomes_of(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the before/after table."""
    return outcomes(*_ends(summary, evals))


def count_questions(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> int | None:
    before, after = _ends(summary, evals)
    return before.get("questions") or after.get("questions")


def scores_by_source(evals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """F1 per benchmark in the first and last evaluation (sampled where it was run, else greedy); empty for fewer than two benchmarks."""
    if not evals:
        return []
    first, last = ((scores.get("sampled") or scores.get("greedy") or {}).get("per_source") or {} for scores in (evals[0], evals[-1]))
    if len(first) < 2:
        return []
    return [
        {
            "name": name,
            "questions": scores.get("questions"),
            "before": scores.get(Metric.F1),
            "after": (last.get(name) or {}).get(Metric.F1) if len(evals) > 1 else None,
        }
        for name, scores in first.items()
    ]
