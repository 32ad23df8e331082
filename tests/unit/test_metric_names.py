"""Names of metrics: what is read somewhere is what is measured, and the pages name it as it is."""

import ast
import re
from pathlib import Path

from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.observability.report.charts import CHARTS
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.search.results import SearchStatus
from igpo_megatron.tools.tally import Tally, new_tallies, tally_metrics
from igpo_megatron.types import (
    EVALUATION_KINDS,
    SEARCH,
    Metric,
    Node,
    Prompt,
    RolloutGroup,
    Status,
    Trajectory,
    evaluated,
    gain_of_turn,
    of_tool,
    without_replay,
)

ROOT = Path(__file__).resolve().parents[2]


def test_every_metric_that_several_files_name_is_spelled_in_one_place():
    spelled = "|".join(metric for metric in Metric if "_" in metric or "/" in metric)
    assert "logprob_gap_max" in spelled
    for path in sorted((ROOT / "igpo_megatron").rglob("*.py")):
        if path.name != "types.py" and path.parent.name != "chat":  # where `tool_calls` is a key of messages
            found = re.findall(rf"[\"']((?:eval/\w+/)?(?:{spelled}))[\"']", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name} spells {found}; use Metric of igpo_megatron/types.py"


def test_tools_read_metrics_that_there_are():
    for path, names in (("tools/gpu/learn.py", "_CURVE"), ("tools/bench/algorithms.py", "SPENT")):
        (value,) = re.findall(rf"^{names} = (\(.*\))$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert set(ast.literal_eval(value)) <= set(Metric), path


def test_the_report_draws_only_what_is_measured():
    tools = new_tallies([SEARCH, "visit", "python"])
    for tally in tools.values():
        tally.add("ok", 0.5, cached=False, failure=None)
    known = {*Metric, *tally_metrics(tools), gain_of_turn("*"), without_replay(Metric.LOGPROB_GAP_MAX)}
    known |= {evaluated(kind, score) for kind in EVALUATION_KINDS for score in Metric}
    drawn = [name for chart in CHARTS for name in chart.series]
    assert set(drawn) <= known and len(drawn) == len(set(drawn))
    assert {of_tool(SEARCH, status) for status in SearchStatus} <= set(drawn), "a search that ends so is not drawn"


def test_the_page_about_the_report_names_its_panels():
    page = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z].*?) \|", page.partition("## What the curves mean")[2], re.MULTILINE)
    panels = {chart.title for chart in CHARTS}
    assert len(rows) > 5
    for row in rows:
        assert row in panels or {name.strip().capitalize() for name in row.split(", ")} <= {panel.capitalize() for panel in panels}, row


def test_metrics_that_a_group_carries_survive_a_file_and_a_checkpoint_as_plain_names(tmp_path):
    group = RolloutGroup(Prompt("q", "?", ("a",), "s"), [Node(None, "prompt", [1]), Node(0, "action", [2], 1)])
    group.trajectories.append(Trajectory([0, 1], Status.FINISHED, reward=1.0, reward_parts={Metric.F1: 1.0}))
    group.metrics[Metric.REPLAYED] = 1.0
    write_rollouts(tmp_path / "r.parquet", 1, [group])
    ((_, (back,)),) = read_rollouts(tmp_path / "r.parquet")
    assert (back.metrics, back.trajectories[0].reward_parts) == ({"replayed": 1.0}, {"f1": 1.0})
    buffer = SuccessBuffer(1, 0.0)
    buffer.exchange([group], 1)
    restored = SuccessBuffer(1, 0.0)
    restored.load_state(buffer.state())
    assert restored.successes["q"].trajectories[0].reward_parts == {"f1": 1.0}
    assert Tally().metrics("visit") == {"visit/calls": 0.0, "visit/cached": 0.0}
