"""Supervised runs of real ranks: their held-out loss is that of transformers, they stop for it, and resume as if nothing had been."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import make_config, run_ranks
from groups import branched_groups, random_groups
from scripted_run import run
from test_layouts import reference_logprobs

from checkpoint_conversion.convert import megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import ConversionError
from igpo_megatron import cli
from igpo_megatron.config import host
from igpo_megatron.config.load import load
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.policy.policy import Policy
from igpo_megatron.training import main, supervised
from igpo_megatron.types import RolloutGroup, RunStopped

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"


def measured(policy: Policy, groups: list[RolloutGroup]) -> float:
    return supervised.held_out_nll(policy, groups if policy.ranks.is_main else [])


@pytest.mark.parametrize("layout", [{}, {"parallel__data": 2}, {"parallel__tensor": 2}], ids=str)
def test_the_held_out_loss_is_that_of_transformers_whatever_the_layout(layout: dict[str, int], hf_folders: dict[str, Path]) -> None:
    """Turns that several rows have, since trees are cut, count once; probes and observations do not count."""
    groups = [*random_groups(seed=3), *branched_groups(seed=4)]
    nodes = [node for group in groups for node in group.nodes]
    scores = reference_logprobs(hf_folders["qwen2"], groups)
    actions = [value for node, found in zip(nodes, scores, strict=True) if node.kind == "action" for value in found]
    config = make_config(hf_folders["qwen2"], packing__row_tokens=60, rollout__temperature=0.5, **layout)
    found = run_ranks(measured, config, groups)
    assert found == pytest.approx([-sum(actions) / len(actions)] * len(found), abs=1e-5)
    assert len({*found}) == 1, "every rank has to decide alike"


def train(folder: Path, *overrides: str, world: int = 1) -> tuple[list[int], str]:
    """Seven demonstrations, three of them in a step, and four held out."""
    write_rollouts(folder / "train.parquet", 0, random_groups(seed=1, count=7, probes=False))
    write_rollouts(folder / "held_out.parquet", 0, random_groups(seed=2, count=4, probes=False))
    return run(folder, arguments(folder, *overrides, f"parallel.data={world}"), (), world)


def arguments(folder: Path, *overrides: str) -> list[str]:
    (folder / "my.yaml").write_text(f"run: {{name: run, folder: {folder}, device: cpu}}\n", encoding="utf-8")
    return [
        *(str(folder / "my.yaml"), f"model.path={POLICY}", "model.dtype=fp32", "rollout.prompts_per_step=3", "track.dump_every=0"),
        *(f"run.replay={folder / 'train.parquet'}", "loss.name=sft", f"loss.held_out={folder / 'held_out.parquet'}"),
        *("loss.held_out_every=2", "optim.lr=1e-3", "checkpoint.every=0", "checkpoint.keep=1", "packing.row_tokens=128"),
        *overrides,
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "run/metrics.jsonl")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run/checkpoints").iterdir())


LOSSES = {0: 3.0, 2: 1.0, 4: 2.0, 6: 1.5, 8: 0.0}
EARLY = ("run.steps=10", "loss.patience=2", "optim.decay=linear")


def test_a_run_stops_early_and_keeps_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervised, "held_out_nll", lambda policy, _: LOSSES[policy.steps_taken])
    given = (*EARLY, "checkpoint.in_background=true")
    codes, printed = train(tmp_path, *given)
    assert codes == [0], printed
    measured = {row["step"]: row["held_out_nll"] for row in rows(tmp_path) if "held_out_nll" in row}
    assert measured == {step: LOSSES[step] for step in (0, 2, 4, 6)} and rows(tmp_path)[-1]["step"] == 6
    assert [row["lr"] for row in rows(tmp_path)[1:]] == pytest.approx([1e-3 * (1 - step / 9) for step in range(6)])
    assert checkpoints(tmp_path) == ["best", "step_000002", "step_000006"]
    assert (tmp_path / "run/checkpoints/best").resolve().name == "step_000002"
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["stopped_at"]) == (10, 6)
    assert summary["held_out"] == {"best_step": 2, "best_nll": 1.0, "worse": 2}
    sentence = "stopped early after step 6 of 10: the least held-out loss is 1.0000, after step 2 (checkpoints/best)"
    assert sentence in printed and "held-out loss 1.500" in printed

    assert cli._is_finished(load(tmp_path / "my.yaml", arguments(tmp_path, *given, "parallel.data=1")[1:]))
    said = capsys.readouterr().out
    assert sentence in said and "this run is finished" in said and "raise run.steps" not in said

    # Killed before it had written its summary, it has no step to repeat.
    before = rows(tmp_path)
    (tmp_path / "run/summary.json").unlink()
    assert train(tmp_path, *given)[0] == [0]
    assert rows(tmp_path) == before and (tmp_path / "run/summary.json").is_file()


def test_a_run_whose_best_checkpoint_is_lost_takes_the_next_measurement_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "held_out_nll", lambda policy, _: LOSSES[policy.steps_taken])
    given = ("run.steps=4", "checkpoint.every=1", "checkpoint.keep=1")
    with monkeypatch.context() as patch:
        patch.setattr(main, "update_metrics", stopping(at=4))
        assert train(tmp_path, *given)[0] == [1]
    assert checkpoints(tmp_path) == ["best", "step_000002", "step_000003"]
    shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    assert train(tmp_path, *given)[0] == [0]
    assert checkpoints(tmp_path) == ["best", "step_000004"] and (tmp_path / "run/checkpoints/best").resolve().name == "step_000004"


def stopping(at: int) -> Any:
    original = main.update_metrics

    def update_metrics(policy: Policy, results: Any) -> dict[str, float]:
        if policy.steps_taken == at:
            raise RunStopped("a test ends it here")
        return original(policy, results)

    return update_metrics


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    given = ("run.steps=8", "loss.patience=3", "checkpoint.every=3")
    codes, printed = train(whole, *given, world=world)
    assert codes == [0] * world, printed
    with monkeypatch.context() as patch:
        patch.setattr(main, "update_metrics", stopping(at=6))
        assert 1 in train(parts, *given, world=world)[0]
    codes, printed = train(parts, *given, world=world)
    assert codes == [0] * world and "resuming from" in printed, printed
    compared = ("step", "loss", "nll", "held_out_nll", "epoch", "lr")
    expected, found = ([{name: row.get(name) for name in compared} for row in rows(folder)] for folder in (whole, parts))
    assert found == expected and len(found) == 9
    assert [row["epoch"] for row in found[1:]] == pytest.approx([step / 3 for step in range(1, 9)])
    losses = [row["held_out_nll"] for row in found if row["held_out_nll"] is not None]
    assert len(losses) == 5 and all(later < before for before, later in pairwise(losses[:3]))
    assert checkpoints(parts) == checkpoints(whole)


def test_a_run_keeps_its_dtype_on_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("model.dtype=auto", "run.steps=2", "checkpoint.every=1")
    with monkeypatch.context() as patch:
        patch.setattr(host, "best_dtype", lambda cuda, flags: "bf16")
        patch.setattr(main, "update_metrics", stopping(at=2))
        codes, printed = train(tmp_path, *given)
        assert codes == [1] and "auto: model.dtype=bf16" in printed
    monkeypatch.setattr(host, "best_dtype", lambda cuda, flags: "fp32")
    codes, printed = train(tmp_path, *given)
    assert codes == [0] and "resuming from" in printed and "auto: model.dtype=bf16" in printed, printed
    assert json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))["model"]["dtype"] == "bf16"
    codes, printed = train(tmp_path, *given, "model.dtype=fp32")
    assert codes == [2] and "model.dtype: 'bf16' -> 'fp32'" in printed


def test_the_best_checkpoint_converts_and_a_missing_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "held_out_nll", lambda policy, _: LOSSES[policy.steps_taken])
    assert train(tmp_path, "run.steps=4")[0] == [0]
    folder = tmp_path / "run/checkpoints"
    assert checkpoints(tmp_path) == ["best", "step_000002", "step_000004"]
    for name in ("best", "step_000002"):
        megatron_to_hf(folder / name, tmp_path / name)
    best, second = (HfReader(tmp_path / name) for name in ("best", "step_000002"))
    name = "model.embed_tokens.weight"
    assert (best.get(name) == second.get(name)).all() and not (best.get(name) == HfReader(POLICY).get(name)).all()
    with pytest.raises(ConversionError, match="step_000003"):
        megatron_to_hf(folder / "step_000003", tmp_path / "none")
