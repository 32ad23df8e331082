"""Two steps of `igpo train` with a real language model as a user would start it on CPU: two ranks, vLLM, whatever `auto` means here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from demo_runs import DemoRuns
from language_model import BOUNDS, language_model

from checkpoint_conversion.convert import megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.config.host import best_dtype, cpu_flags

SMALL = (
    "model.dtype=auto",
    "sync.max_gap=null",
    "parallel.data=2",
    "run.steps=2",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=2",
    "rollout.max_turns=2",
    "rollout.max_tokens_per_turn=24",
    "rollout.tool_in_prompt=true",
    "rollout.engine.kv_cache_mib=128",
    "rollout.engine.max_num_seqs=8",
    # Before its cold start it never writes our format: all rewards are alike, and nothing but this term says what to learn.
    "loss.entropy_coef=0.01",
    "checkpoint.every=2",
    "checkpoint.keep=1",
    "eval.at_ends=false",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return language_model()


@pytest.fixture(scope="module")
def demo(folder: Path) -> Iterator[DemoRuns]:
    # Not in pytest's folder, which outlives the tests: a checkpoint of this model has 2 GB.
    with tempfile.TemporaryDirectory(prefix="igpo-e2e-") as temporary:
        (Path(temporary) / "runs").mkdir()
        yield DemoRuns(Path(temporary) / "runs", Path(temporary))


def test_two_steps_train_it_with_the_gap_of_its_dtype(demo: DemoRuns, folder: Path) -> None:
    code, output = demo.train("llm", *SMALL, f"model.path={folder}")
    assert code == 0, output
    dtype = best_dtype(False, cpu_flags())
    assert f"model.dtype={dtype}" in output
    rows = demo.rows("llm")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["grad_norm"] > 0
        # Two models of this dtype, each as far from fp32 as the bound allows.
        assert 0 < row["logprob_gap_mean"] < 2 * BOUNDS[dtype].mean and row["logprob_gap_max"] < 2 * BOUNDS[dtype].worst
    (checkpoint,) = (demo.folder / "llm" / "checkpoints").iterdir()
    megatron_to_hf(checkpoint, demo.folder / "trained")
    before, after = HfReader(folder), HfReader(demo.folder / "trained")
    assert checkpoint.name == "step_000002" and before.names() == after.names()
    # In bf16 a norm's 1 is not moved by two steps of 3e-4.
    for name in (name for name in before.names() if "norm" not in name):
        assert not torch.equal(before.get(name).to(after.dtype(name)), after.get(name)), name
