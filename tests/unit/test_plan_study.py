"""The scaling study's page and inputs, and what the planner's benchmark concludes from its cases."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

import scaling_study
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.plan.machines import gpu
from igpo_megatron.plan.model_shape import find_shape
from igpo_megatron.plan.search import Plan, search
from igpo_megatron.plan.types import Settings, Workload
from igpo_megatron.plan.workload import from_rollouts
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory


def test_latency_is_the_lognormal_through_median_and_95th_percentile(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 2, "search/p50_s": 0.4, "search/p95_s": 1.6}, {"step": 3, "search/p50_s": 0.6, "search/p95_s": 2.4}]
    file.write_text("\n".join(map(json.dumps, lines)))
    workload = scaling_study.with_latency(Workload(), file)
    assert workload.tool_median == pytest.approx(0.5)
    assert workload.tool_median * math.exp(1.645 * workload.tool_sigma) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no line with search/p50_s"):
        scaling_study.with_latency(Workload(), tmp_path / "other.jsonl")


def test_a_runs_rollouts_give_the_lengths(tmp_path):
    group = RolloutGroup(Prompt("0", "?", ("a",), "t"), [Node(None, "prompt", [1] * 30)])
    for first in (10, 40):
        path = [0]
        for kind, length in (("action", first), ("observation", 7), ("action", 20)):
            path = [*path, group.add(Node(path[-1], kind, [2] * length, 1))]
        group.trajectories.append(Trajectory(path, Status.FINISHED))
    write_rollouts(tmp_path / "step.parquet", 1, [group])
    found = from_rollouts([tmp_path / "step.parquet"], Workload(max_context=64))
    assert (found.samples, found.prompt_tokens, found.turns, found.max_turns) == (2, 30, 2.0, 2)
    assert (found.turn_tokens, found.observation_tokens, found.max_context) == (22.5, 7.0, 97)
    assert found.source.startswith("measured: 2 trajectories") and found.tool_median == Workload().tool_median


def test_the_page_has_a_curve_for_every_staleness_and_says_what_was_measured():
    machine, workload = gpu("h100"), Workload(prompts=4, samples=4, max_context=8192)
    plan = search(Plan("Qwen2.5-1.5B", find_shape("Qwen2.5-1.5B")[1], machine, workload, Settings(), 2))
    points = [scaling_study.point(plan, cells, k, 6) for cells in (1, 2) for k in (0, 1)]
    assert [one.gpus for one in points] == [2, 2, 4, 4]
    synchronous, stale = points[0].outcome, points[1].outcome
    assert synchronous.staleness == 0 and 0 < stale.largest_staleness <= 1 and stale.step < synchronous.step
    rows = [scaling_study.as_row(one, points[0]) for one in points]
    facts = scaling_study.provenance(plan, measured_lengths=True, measured_latency=False)
    page = scaling_study.page("Qwen2.5-1.5B", plan, rows, facts)
    assert page.count("<polyline") == 2 * len(scaling_study.PANELS)
    assert "measured: 4.0 turns" in page and "modelled: lognormal" in page and "http" not in page.replace("http-equiv", "")
    assert rows[0]["speedup"] == 1.0


def test_a_curve_ends_where_its_numbers_say():
    svg = scaling_study.curves([("red", [(1, 0.0), (10, 1.0)])], share=True)
    assert '<polyline points="46.0,212.0 468.0,10.0"' in svg


@pytest.mark.parametrize(("value", "top"), [(0, 1), (0.03, 0.04), (1.0, 1), (2.1, 4), (140.6, 200), (9.5, 10)])
def test_an_axis_ends_at_a_short_number(value, top):
    assert scaling_study.nice_top(value) == pytest.approx(top)


def test_the_benchmark_counts_clear_pairs_of_one_model_only():
    import plan as bench

    rows = [
        {"model": "a", "measured_s": 1.0, "predicted_s": 1.1},
        {"model": "a", "measured_s": 2.0, "predicted_s": 1.0},
        {"model": "a", "measured_s": 2.1, "predicted_s": 3.0},
        {"model": "b", "measured_s": 9.0, "predicted_s": 0.1},
    ]
    assert bench.ranking(rows) == (1, 2)  # the second and third are too near to count


def test_the_benchmark_predicts_the_model_that_it_measures():
    import plan as bench

    from igpo_megatron.plan.types import Row

    machine = replace(gpu("h100"), device="cpu", cores=2)
    memory, seconds = bench.predict(bench.Case("small"), machine, [Row(896, 3e5, 512)] * 4)
    # 6 layers of 512 wide: embedding and head 2 x 8192 x 512, a layer 4 x ... as transformers counts them, in fp32
    layer = 512 * (512 + 2 * 256) + 512 + 2 * 256 + 512 * 512 + 3 * 512 * 1408 + 2 * 512
    assert memory["weights"] == 4 * (2 * 8192 * 512 + 6 * layer + 512) and memory["optimizer"] == 2 * memory["weights"]
    assert seconds > bench.predict(bench.Case("small"), machine, [Row(896, 3e5, 512)] * 2)[1]
