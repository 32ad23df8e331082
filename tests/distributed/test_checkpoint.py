"""Checkpoints: resume at any layout as if nothing had happened, and never a half-written one."""

from __future__ import annotations

import inspect
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import load_hf, random_groups
from megatron.core import dist_checkpointing
from test_layouts import row_loss, with_off_policy_logprobs

from checkpoint_conversion.convert import megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.policy import checkpoint, checkpoint_sums, checkpoint_writer
from igpo_megatron.policy.policy import Policy
from igpo_megatron.policy.weight_sync import named_weights
from igpo_megatron.types import RolloutGroup, RunStopped, UserError

SMALL = {"optim__lr": 1e-3}


def losses(policy: Policy, groups: list[RolloutGroup], steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next steps on the same groups."""
    rows = pack_for_training(groups, row_tokens=60, multiple=policy.row_multiple, token_weight=lambda n: 1.0 / n)
    results = [policy.optimizer_step(policy.forward_backward(rows, partial(row_loss, step_counts(groups)))) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def train_and_save(policy: Policy, folder: Path, groups: list[RolloutGroup]) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Three steps, a checkpoint, then the two steps that a resumed run must repeat; and the weights as saved."""
    losses(policy, groups, 3)
    checkpoint.save(policy, folder, 3, {"prompts": {"row": 24}}, keep=2)
    weights = {name: tensor.clone() for name, tensor in named_weights(policy)}
    return losses(policy, groups, 2), weights


def save_behind_training(
    policy: Policy, folder: Path, groups: list[RolloutGroup]
) -> tuple[list[tuple[float, float]], list[tuple[bool, list[str]]]]:
    """As `train_and_save`, but nothing is written before both later steps are done; (finished, complete folders) on the way."""
    losses(policy, groups, 3)
    trained, write = threading.Event(), checkpoint_writer._write

    def late(*arguments: Any) -> None:
        assert trained.wait(300)
        write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "_write", late)
        checkpoint.save(policy, folder, 3, {"prompts": {"row": 24}}, keep=2)
        seen = [(checkpoint.finish(policy, wait=False), [path.name for path in checkpoint.complete(folder)])]
        later = losses(policy, groups, 2)
        trained.set()
        seen.append((checkpoint.finish(policy, wait=True), [path.name for path in checkpoint.complete(folder)]))
    return later, seen


@pytest.mark.parametrize("layout", [{"parallel__tensor": 2}, {"parallel__data": 2}])
def test_a_checkpoint_written_behind_training_holds_the_state_it_was_asked_for(
    hf_folders: dict[str, Path], tmp_path: Path, layout: dict[str, Any]
) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=6, probes=False))
    config = make_config(hf_folders["qwen2_tied"], **layout, **SMALL, checkpoint__in_background=True)
    answers = run_ranks(save_behind_training, config, tmp_path, groups)
    assert [seen for _, seen in answers] == [[(False, []), (True, ["step_000003"])]] * 2
    later = answers[0][0]
    step, state, taken, resumed = run_ranks(load_and_train, config, tmp_path, groups)[0]
    assert (step, state, taken) == (3, {"prompts": {"row": 24}}, 3)
    for found, expected in zip(resumed, later, strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


def fail_to_write(policy: Policy, folder: Path) -> tuple[str, list[Path]]:
    """What every rank is told when one of them cannot write, and what counts as a checkpoint then."""

    def full(*arguments: Any, **named: Any) -> None:
        arguments[3].put((arguments[1], OSError("no space left on device")))

    with pytest.MonkeyPatch.context() as patch:
        if policy.ranks.rank == 1:
            patch.setattr(checkpoint_writer.FileSystemWriterAsync, "write_preloaded_data", full)
        checkpoint.save(policy, folder, 1, {}, keep=2)
        try:
            checkpoint.finish(policy, wait=True)
        except RunStopped as error:
            return str(error), checkpoint.complete(folder)
    return "", checkpoint.complete(folder)


def test_a_rank_that_cannot_write_behind_training_is_told_by_every_rank(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(hf_folders["qwen2_tied"], parallel__tensor=2, checkpoint__in_background=True)
    answers = run_ranks(fail_to_write, config, tmp_path)
    assert answers == [("step_000001 could not be written by rank 1: no space left on device", [])] * 2


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


def resume_from_damaged(policy: Policy, folder: Path) -> list[str]:
    """What every rank finds as the checkpoints are damaged one by one; the last of three was written behind training."""
    found = []
    for step in (1, 2, 3):
        checkpoint.save(policy, folder, step, {"saved": step}, keep=3)
    checkpoint.finish(policy, wait=True)
    for step, rank in ((4, 0), (3, 1), (2, 0), (1, 1)):
        if step < 4 and policy.ranks.is_main:
            shard = folder / f"step_{step:06d}" / "model" / f"__{rank}_0.distcp"
            content = shard.read_bytes()
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        torch.distributed.barrier()
        try:
            newest = checkpoint_sums.newest_whole(folder)
            assert newest.folder is not None
            found.append(f"{checkpoint.load(policy, newest.folder)} past {[path.name for path in newest.passed_over]}")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("in_background", [False, True])
def test_all_ranks_go_back_to_the_same_whole_checkpoint(hf_folders: dict[str, Path], tmp_path: Path, in_background: bool) -> None:
    config = make_config(hf_folders["qwen2_tied"], parallel__tensor=2, checkpoint__in_background=in_background)
    left, right = run_ranks(resume_from_damaged, config, tmp_path)
    assert left == right
    assert left[:3] == [
        "(3, {'saved': 3}) past []",
        "(2, {'saved': 2}) past ['step_000003']",
        "(1, {'saved': 1}) past ['step_000003', 'step_000002']",
    ]
    assert left[3].startswith(f"no checkpoint in {tmp_path} is intact (step_000003: model/__1_0.distcp does not hold what was written")


def test_newer_megatron_is_told_to_write_by_itself() -> None:
    """In later versions `save` has another default, which needs a package that a policy on CPU has no use for."""
    assert checkpoint.own_writer(lambda state, folder, async_strategy="nvrx": None) == {"async_strategy": "mcore"}
    assert checkpoint.own_writer(lambda state, folder: None) == {}
    assert set(checkpoint.WRITER) <= set(inspect.signature(dist_checkpointing.save).parameters)
