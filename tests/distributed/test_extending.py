"""Each of a user's own advantage, loss, reward, search back-end, tool and protocol is one file and one name, and trains."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.tracker import read_metrics
from igpo_megatron.types import RolloutGroup

ROOT = Path(__file__).resolve().parents[2]
SEARCH = '<think>I look it up.</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["capital of Italy"]}}\n</tool_call>'
RIGHT = "<think>I know.</think>\n<answer>Rome</answer>"
WRONG = "<think>I guess.</think>\n<answer>Milan</answer>"
SCRIPT = ((SEARCH,), (RIGHT, WRONG))


def train(folder: Path, *overrides: str, script: tuple[tuple[str, ...], ...] = SCRIPT, code: int = 0) -> str:
    """What two steps of training print. `folder` is in PYTHONPATH."""
    asked = {"prompt": [{"role": "user", "content": "What is the capital of Italy?"}], "reward_model": {"ground_truth": ["Rome"]}}
    pq.write_table(pa.Table.from_pylist([{"data_source": "test", **asked} for _ in range(4)]), folder / "questions.parquet")
    (folder / "corpus.jsonl").write_text(json.dumps({"id": "1", "title": "Italy", "text": "Rome is the capital of Italy."}) + "\n")
    command = [
        *(sys.executable, str(Path(__file__).with_name("scripted_run.py")), str(ROOT / "examples/quickstart/igpo.yaml")),
        *("run.name=run", f"run.folder={folder}", f"model.path={ROOT / 'examples/quickstart/policy'}", "run.steps=2"),
        *(f"search.corpus={folder / 'corpus.jsonl'}", f"data.train=[{folder / 'questions.parquet'}]", "data.eval=[]", "eval.at_ends=false"),
        *("data.balance=none", "parallel.tensor=1", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "checkpoint.every=0"),
        *("rollout.max_tokens_per_turn=160", "packing.row_tokens=2048"),
        *overrides,
    ]
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SCRIPT": json.dumps(script), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def trained(folder: Path) -> list[RolloutGroup]:
    """The groups of both steps, after it is seen that both have changed the weights."""
    rows = [row for row in read_metrics(folder / "run/metrics.jsonl") if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    return [group for path in sorted((folder / "run/rollouts").glob("*.parquet")) for _, groups in read_rollouts(path) for group in groups]


def test_two_steps_are_trained_as_the_script_says(tmp_path: Path) -> None:
    train(tmp_path)
    for group in trained(tmp_path):
        assert sorted(trajectory.reward for trajectory in group.trajectories) == pytest.approx([0.0, 1.0])
        assert [node.call.name for node in group.nodes if node.call] == ["search", "search"]
