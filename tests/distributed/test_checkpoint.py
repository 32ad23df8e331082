"""Checkpoints: resume at any layout as if nothing had happened, and never a half-written one."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import load_hf, random_groups
from test_layouts import row_loss, with_off_policy_logprobs

from checkpoint_conversion.convert import megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.actor import checkpoint
from igpo_megatron.actor.policy import Policy
from igpo_megatron.actor.weight_sync import named_weights
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.types import RolloutGroup

SMALL = {"optim__lr": 1e-3}


def losses(policy: Policy, groups: list[RolloutGroup], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps on the same groups."""
    rows = pack_for_training(groups, row_tokens=60, multiple=policy.row_multiple, token_weight=lambda n: 1.0 / n)
    results = [policy.train_step(rows, partial(row_loss, step_counts(groups))) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def train_and_save(policy: Policy, folder: Path, groups: list[RolloutGroup]) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Three steps, a checkpoint, then the two steps that a resumed run must repeat; and the weights as saved."""
    losses(policy, groups, 3)
    checkpoint.save(policy, folder, 3, {"prompts": {"row": 24}}, keep=2)
    weights = {name: tensor.clone() for name, tensor in named_weights(policy)}
    return losses(policy, groups, 2), weights


def load_and_train(policy: Policy, folder: Path, groups: list[RolloutGroup]) -> tuple[int, dict[str, Any], int, list[tuple[float, float]]]:
    step, state = checkpoint.load(policy, checkpoint.complete(folder)[-1])
    return step, state, policy.steps_taken, losses(policy, groups, 2)


SPREAD_OVER_TWO: list[dict[str, Any]] = [{f"parallel__{kind}": 2} for kind in ("tensor", "pipeline", "data", "context")]


@pytest.mark.parametrize("saved_at", SPREAD_OVER_TWO)
def test_a_checkpoint_resumes_at_any_other_layout_with_the_same_next_losses(
    hf_folders: dict[str, Path], tmp_path: Path, saved_at: dict[str, Any]
) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=6, probes=False))
    folder = hf_folders["qwen2_tied"]
    uninterrupted, weights = run_ranks(train_and_save, make_config(folder, **saved_at, **SMALL), tmp_path, groups)[0]
    assert uninterrupted[1][0] != pytest.approx(uninterrupted[0][0], abs=1e-4), "the second loss must show a wrong optimizer state"
    for layout in [{}, *SPREAD_OVER_TWO]:
        step, state, taken, resumed = run_ranks(load_and_train, make_config(folder, **layout, **SMALL), tmp_path, groups)[0]
        assert (step, state, taken) == (3, {"prompts": {"row": 24}}, 3)
        for found, expected in zip(resumed, uninterrupted, strict=True):
            assert found == pytest.approx(expected, rel=2e-5), layout
    megatron_to_hf(checkpoint.complete(tmp_path)[-1], tmp_path / "hf")
    reader = HfReader(tmp_path / "hf")
    assert set(reader.names()) == set(weights)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in weights.items())
    load_hf(tmp_path / "hf")


def test_a_checkpoint_of_experts_resumes_at_other_expert_parallel_sizes_and_exports(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=6, probes=False))
    folder = hf_folders["qwen3_moe"]
    saved_at = {"parallel__data": 2, "parallel__expert": 2}
    uninterrupted, weights = run_ranks(train_and_save, make_config(folder, **saved_at, **SMALL), tmp_path, groups)[0]
    assert uninterrupted[1][0] != pytest.approx(uninterrupted[0][0], abs=1e-4), "the second loss must show a wrong optimizer state"
    for layout in ({}, {"parallel__pipeline": 2}, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2}):
        *_, resumed = run_ranks(load_and_train, make_config(folder, **layout, **SMALL), tmp_path, groups)[0]
        for found, expected in zip(resumed, uninterrupted, strict=True):
            assert found == pytest.approx(expected, rel=2e-5), layout
    megatron_to_hf(checkpoint.complete(tmp_path)[-1], tmp_path / "hf")
    reader = HfReader(tmp_path / "hf")
    assert set(reader.names()) == set(weights)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in weights.items())


def save_twice(policy: Policy, folder: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(policy, folder, step, {}, keep=2)


def test_only_the_newest_checkpoints_are_kept_and_half_written_ones_are_not_seen(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "step_000009.partial" / "model").mkdir(parents=True)
    run_ranks(save_twice, make_config(hf_folders["qwen3"], parallel__tensor=2), tmp_path)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]
    assert not list(tmp_path.glob("*.partial"))
    # A save that was killed leaves a folder without state.json, under another name: neither is taken for a checkpoint.
    shutil.copytree(tmp_path / "step_000003", tmp_path / "step_000004.partial")
    shutil.copytree(tmp_path / "step_000003", tmp_path / "step_000005")
    (tmp_path / "step_000005" / "state.json").unlink()
    assert checkpoint.complete(tmp_path)[-1].name == "step_000003"
