"""The whole stack for three steps: torchrun ranks, Ray, vLLM, real search; then what a finished run allows and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import prepare_data
import world_facts
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "run.steps=3",
    "rollout.prompts_per_step=3",
    "rollout.samples_per_prompt=4",
    "rollout.engine.kv_cache_mib=64",
    "checkpoint.every=2",
    "eval.questions=5",
    "eval.samples=2",
]


class Runs:
    """Starts `igpo train` on the demo in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        world = world_facts.build()
        prepare_data.write_corpus(world.passages, folder / "corpus.jsonl")
        for split in ("train", "test"):
            prepare_data.write_questions((question for question in world.questions if question.split == split), folder / f"{split}.parquet")

    def train(self, name: str, *overrides: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
        files = [
            f"search.corpus={self.folder / 'corpus.jsonl'}",
            f"data.train=[{self.folder / 'train.parquet'}]",
            f"data.eval=[{self.folder / 'test.parquet'}]",
        ]
        command = [sys.executable, "-m", "igpo_megatron.cli", "train", str(ROOT / "examples/quickstart/igpo.yaml"), f"run.name={name}"]
        command += [f"run.folder={self.folder}", f"model.path={ROOT / 'examples/quickstart/policy'}", *files, *SMALL, *overrides]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def metrics(self, name: str) -> list[dict[str, float]]:
        return read_metrics(self.folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A finished three-step run called `first`."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    done = made.train("first")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_three_steps_of_the_whole_stack_leave_everything_a_run_should(runs: Runs) -> None:
    folder = runs.folder / "first"
    summary = json.loads((folder / "summary.json").read_text())
    for end in ("before", "after"):
        assert summary[end]["questions"] == 5 and 0.0 <= summary[end]["f1_sampled"] <= 1.0
        assert summary[end].keys() >= {"f1_greedy", "em_greedy", "format_valid", "searches_per_question", "f1_sampled_se"}
    assert summary["steps"] == 3 and summary["wall_s"] > 0 and summary["phases_s"].keys() >= {"rollout", "score", "train", "sync"}
    rows = [row for row in runs.metrics("first") if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # fp32 on both sides: engine and trainer may differ by rounding only, before and after every sync.
    assert all(row["canary_gap"] < 1e-3 and row["logprob_gap_max"] < 1e-3 for row in rows)
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_000002", "step_000003"]
    assert (folder / "report.html").stat().st_size > 10_000
    for step in (1, 2, 3):
        ((number, groups),) = read_rollouts(folder / "rollouts" / f"step_{step:06d}.parquet")
        assert number == step and len(groups) == 3 and all(len(group.trajectories) == 4 for group in groups)
        versions = {node.weight_version for group in groups for node in group.nodes if node.kind == "action"}
        assert versions == {step - 1}
        assert any(gain is not None for group in groups for end in group.trajectories for gain in end.gains)


def test_a_second_call_prints_the_table_again_and_trains_nothing(runs: Runs) -> None:
    again = runs.train("first", timeout_s=60)
    assert again.returncode == 0 and "held-out" in again.stdout and "finished" in again.stdout
    assert len(runs.metrics("first")) == 4


def test_changed_settings_are_refused_with_the_keys_that_differ(runs: Runs) -> None:
    refused = runs.train("first", "optim.lr=0.5", timeout_s=60)
    assert refused.returncode == 2 and "optim.lr: 0.0003 -> 0.5" in refused.stderr and "Traceback" not in refused.stderr


def test_a_recorded_step_trains_again_without_engines_to_the_same_loss(runs: Runs) -> None:
    recorded = runs.folder / "first" / "rollouts" / "step_000001.parquet"
    for name, layout in (("replay-tp2", "parallel.tensor=2"), ("replay-tp1", "parallel.tensor=1")):
        done = runs.train(name, f"run.replay={recorded}", "run.steps=1", "eval.at_ends=false", layout, timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr
        (row,) = runs.metrics(name)
        original = runs.metrics("first")[1]
        assert row["loss"] == pytest.approx(original["loss"], rel=1e-4, abs=1e-6)
        assert row["grad_norm"] == pytest.approx(original["grad_norm"], rel=1e-3)


def test_nothing_of_the_run_is_left_behind(runs: Runs) -> None:
    mine = [process for process in psutil.process_iter(["cmdline"]) if str(runs.folder) in " ".join(process.info["cmdline"] or [])]
    assert mine == []
