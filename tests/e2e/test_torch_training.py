"""`igpo train` without vLLM and Ray: an interrupted run whose engine and policy share a device by turns (see also test_ahead.py)."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_runs import ROOT, DemoRuns, alive, end, family, wait_for

SMALL = (
    "rollout.engine.backend=torch",
    "rollout.engine.kv_cache_mib=64",
    "run.steps=3",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "checkpoint.every=1",
    "eval.at_ends=false",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRuns]:
    with tempfile.TemporaryDirectory(prefix="igpo-e2e-") as temporary:
        yield DemoRuns(tmp_path_factory.mktemp("demo"), Path(temporary))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH by which imports of vLLM and Ray fail."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("ray", "vllm"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} must not be imported by rollout.engine.backend=torch')")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_a_killed_run_by_turns_on_one_device_resumes_and_nothing_is_left_behind(demo: DemoRuns, without: str) -> None:
    settings = (*SMALL, "placement.mode=colocated", "reward.scorer=engine")
    command = ["-m", "igpo_megatron.cli", "train", *demo.arguments("turns", *settings)]
    first = demo.start(command, PYTHONPATH=without)
    wait_for((demo.folder / "turns/checkpoints/step_000001").is_dir, first)
    processes = family(first.pid)
    end(processes)
    first.communicate()
    code, output = demo.train("turns", *settings, PYTHONPATH=without)
    assert code == 0 and "resuming from" in output, output
    rows = demo.rows("turns")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and row["canary_gap"] < 1e-3 and row["logprob_gap_max"] < 1e-3 for row in rows)
    assert all(row["gain"] is not None for row in rows)
    for step, groups in demo.rollouts("turns"):
        assert all(len(group.trajectories) == 4 for group in groups)
        assert {node.weight_version for group in groups for node in group.nodes if node.kind == "action"} == {step - 1}
    assert alive(processes) == [] and list(demo.temporary.glob("igpo-*")) == []
