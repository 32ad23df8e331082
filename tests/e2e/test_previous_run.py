"""A run that the version before has begun goes on: `igpo train` in its folder, with its YAML file, at another layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_runs import ROOT
from previous_version import unpack_stopped_run

from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts


def sampled(path: Path) -> list[tuple[str, list[list[int]]]]:
    """(question, tokens of each sampled turn) of every group of a step."""
    ((_, groups),) = read_rollouts(path)
    return [(group.prompt.id, [node.token_ids for node in group.nodes if node.kind == "action"]) for group in groups]


def test_a_run_of_then_is_finished_as_it_would_have_been(tmp_path: Path) -> None:
    run = unpack_stopped_run(tmp_path) / "runs/stopped"
    then, rollouts = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}, sampled(run / "rollouts/step_000003.parquet")
    # It was stopped behind the rollouts of step 3, and goes on behind step 2.
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "igpo_megatron.cli", "train", "config.yaml", "parallel.tensor=2"]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "resuming from runs/stopped/checkpoints/step_000002" in output, output
    now = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
    assert list(now) == [0, 1, 2, 3] and now[1] == then[1]
    assert sampled(run / "rollouts/step_000003.parquet") == rollouts
    for name in ("loss", "grad_norm", "kl_ref", "entropy"):
        assert now[3][name] == pytest.approx(then[3][name], rel=1e-4), name
    assert (run / "summary.json").is_file() and (run / "report.html").is_file()
