"""Tables fit a terminal of 80 columns with the largest figures that they are made for: no line is longer, nothing is cut off."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console, RenderableType

from igpo_megatron.doctor import machine, probes, tools
from igpo_megatron.observability.metrics import SCORES
from igpo_megatron.observability.summary import evaluation_table, summary_table
from igpo_megatron.plan.machines import gpu
from igpo_megatron.plan.model_shape import find_shape
from igpo_megatron.plan.search import Plan, search
from igpo_megatron.plan.show import show
from igpo_megatron.plan.types import Settings, Workload
from igpo_megatron.tools.tally import Tally


def shown(*tables: RenderableType) -> str:
    """What a terminal of 80 columns shows."""
    console = Console(file=io.StringIO(), width=80, _environ={})
    for table in tables:
        console.print(table)
    return fits(console)


def fits(console: Console) -> str:
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text, text
    return text


def test_the_summary_of_a_run_fits() -> None:
    scores = {name: 0.123 for name, _, _ in SCORES} | {f"{name}_se": 0.012 for name, _, _ in SCORES} | {"searches_per_question": 123.456}
    phases = dict.fromkeys(("startup", "rollout", "score", "advantage", "train", "sync", "eval", "checkpoint"), 1_234_567.8)
    gains = [{"first": -12.345, "last": 123.456}] * 12
    summary = {"before": scores, "after": scores, "steps": 100_000, "wall_s": 1e7, "phases_s": phases, "gain_by_turn": gains}
    text = shown(summary_table(summary | {"max_logprob_gap": 1e-4}))
    assert "F1, greedy, mean over sources" in text and "0.123 ± 0.012" in text and "1234567.8 s" in text


def test_the_table_of_an_evaluation_fits_with_a_row_for_every_source() -> None:
    scores = {"f1": 0.123, "f1_se": 0.045, "em": 0.067, "format_ok": 0.089, "searches": 12.345, "questions": 12_345}
    kind = {**scores, "per_source": {"world_2hop_currency_language": scores, "q" * 60: scores}}
    text = shown(evaluation_table({"step": 0, "sampled": kind, "greedy": kind}))
    assert "world_2hop_currency_language" in text and "all " in text and "12345" in text and "0.045" in text
    assert text.count("0.089") == 3, "of either source and of all questions"
    assert "greedy" in text and "greedy" not in shown(evaluation_table({"step": 0, "sampled": kind})), "what was not run has no column"


@pytest.mark.parametrize(("model", "gpus"), [("Qwen2.5-7B", 1), ("Qwen2.5-72B", 64), ("Qwen3-235B-A22B", 128)])
def test_plans_fit(model: str, gpus: int) -> None:
    workload = Workload(prompts=256, samples=16, max_context=32768)
    plan = search(Plan(model, find_shape(model)[1], gpu("h100"), workload, Settings(), gpus))
    console = Console(file=io.StringIO(), width=80, _environ={})
    show(plan, console)
    assert f"{plan.tried} layouts tried" in fits(console)


def test_the_doctors_tables_fit() -> None:
    advice = "needed for rollout.engine.backend=vllm: extra [cpu] or [gpu]; backend=torch and run.replay do without it"
    rows = [machine.Row("active: gradient accumulation", "fail", "; ".join([f"GPU {n}: NVIDIA H200 NVL" for n in range(8)]), advice)]
    text = shown(machine.as_table([*machine.examine(), *rows]))
    assert "gradient" in text and "fail" in text
    results = [probes.Result("sequential", 123_456_789, 1234.567, 1.2e-3, 1e-4)]
    assert "123,456,789" in shown(probes.as_table(results))
    tally = Tally(Counter(ok=90, rate_limited=7, timeout=2, error=1), [12.345] * 100)
    assert "rate_limited" in shown(tools.as_table([tools.Finding("search", [tools.Level(128, tally, 1000.0)])]))
