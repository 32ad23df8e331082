"""model.head_backward=in_forward: loss, metrics and gradients of every layout are those of recompute, for every loss that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import VOCAB, make_config, run_ranks, run_ranks_for_each
from groups import branched_groups, random_groups
from host_waits import host_waits
from test_layouts import LOSS, gradients, relative_error, with_off_policy_logprobs

from igpo_megatron.algorithms.advantages.tree import entropy_stats
from igpo_megatron.algorithms.losses.clipped import Cispo, Gspo
from igpo_megatron.algorithms.losses.entropy import Aepo, Hapo
from igpo_megatron.algorithms.losses.registry import Loss as LossConfig
from igpo_megatron.algorithms.losses.registry import Sft, objective, token_weight
from igpo_megatron.kernels import token_loss
from igpo_megatron.packing.tree import PackedRow, pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy import model, schedule
from igpo_megatron.policy.policy import Policy
from igpo_megatron.policy.weight_sync import named_weights
from igpo_megatron.types import RolloutGroup

PLAIN = {"parallel__distributed_optimizer": False}
ROW_TOKENS = 90
SEVERAL = 9
"""Targets in a block of the head, so that rows have several and a ragged last one."""

SAMPLED_VOCAB = VOCAB - 9
"""What an engine can sample; probes are scored among all."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inherited by the ranks, which are forked."""
    whole = token_loss.linear_logprob_with_gradients

    def in_blocks(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, workspace: int, **options: Any) -> Any:
        return whole(hidden, weight, *rest, workspace=4 * len(weight) * SEVERAL, **options)

    monkeypatch.setattr(model, "linear_logprob_with_gradients", in_blocks)
    monkeypatch.setattr(token_loss, "COLUMNS", 50)


def trees() -> list[RolloutGroup]:
    """Branches that share predictors, sampled tokens within SAMPLED_VOCAB, probes among all."""
    groups = with_off_policy_logprobs([*branched_groups(seed=7), *random_groups(seed=2)])
    generator = torch.Generator().manual_seed(4)
    for node in (node for group in groups for node in group.nodes):
        if node.kind == "action":
            node.token_ids = [token % SAMPLED_VOCAB for token in node.token_ids]
            node.old_entropies = torch.rand(len(node.token_ids), generator=generator).tolist()
            noise = torch.randn(len(node.token_ids), generator=generator).tolist()
            node.behavior_logprobs = [value + shift for value, shift in zip(node.old_logprobs, noise, strict=True)]
    return groups


def bound(loss: LossConfig, groups: list[RolloutGroup]) -> schedule.Objective:
    """As the trainer binds it."""
    counts = replace(step_counts(groups), entropy=entropy_stats(groups, 0.3))
    return partial(objective, counts=counts, config=loss)


def rows_of(groups: list[RolloutGroup], multiple: int, *, probes: bool = False) -> list[PackedRow]:
    if probes:
        return pack_for_scoring(groups, row_tokens=ROW_TOKENS, multiple=multiple)
    return pack_for_training(groups, row_tokens=ROW_TOKENS, multiple=multiple, token_weight=partial(token_weight, "sequence_mean"))


Step = tuple[dict[str, torch.Tensor], dict[str, float]]


def step(policy: Policy, groups: list[RolloutGroup], loss: LossConfig, in_forward: bool, *, probes: bool = False) -> Step:
    """(gradients, loss and metric sums) of one pass over all rows."""
    rows = rows_of(groups, policy.row_multiple, probes=probes)
    backward = "in_forward" if in_forward else "recompute"
    given, chosen = policy.config, policy.config.model.model_copy(update={"head_backward": backward})
    policy.config = given.model_copy(update={"model": chosen, "rollout": given.rollout.model_copy(update={"temperature": 0.8})})
    policy.sampled_vocab = SAMPLED_VOCAB if probes else None
    sums = policy.forward_backward(rows, bound(loss, groups))
    return gradients(policy), sums


def both(policy: Policy, groups: list[RolloutGroup], losses: list[LossConfig], scale: float) -> list[tuple[Step, Step]]:
    """Per loss, then once more with probes in the rows: by recompute, in forward."""
    policy.chunks[0].config.grad_scale_func = lambda value: value * scale
    found = [(step(policy, groups, loss, False), step(policy, groups, loss, True)) for loss in losses]
    with_probes = partial(step, policy, groups, losses[0], probes=True)
    return [*found, (with_probes(False), with_probes(True))]


LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp1": ("qwen2_tied", {}),
    "untied": ("qwen3", {}),
    "tp2": ("qwen3", {"parallel__tensor": 2}),
    "tp2_sp": ("qwen2_tied", {"parallel__tensor": 2, "parallel__sequence": True}),
    "pp2": ("qwen2_tied", {"parallel__pipeline": 2, "model__recompute": "full"}),
    "cp2": ("qwen3", {"parallel__context": 2}),
    "tp2_pp2_sp": ("qwen3", {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_recompute_at_every_layout(hf_folders: dict[str, Path], layout: str) -> None:
    architecture, settings = LAYOUTS[layout]
    for steps in run_ranks(both, make_config(hf_folders[architecture], **settings, **PLAIN), trees(), [LOSS], 2.5):
        same(steps)


def test_a_step_is_that_of_recompute_in_a_virtual_pipeline(deep_folders: dict[str, Path]) -> None:
    config = make_config(deep_folders["qwen2_tied"], parallel__pipeline=2, parallel__virtual_pipeline=3, **PLAIN)
    for steps in run_ranks(both, config, trees(), [LOSS], 1.0):
        same(steps)


def same(steps: list[tuple[Step, Step]], tolerance: float = 1e-5) -> None:
    for (expected, sums), (found, new_sums) in steps:
        assert new_sums == pytest.approx(sums, rel=1e-6)
        assert set(found) == set(expected)
        for name, tensor in found.items():
            assert relative_error(tensor, expected[name]) < tolerance, name
        assert any(float(tensor.abs().max()) > 1e-4 for tensor in expected.values()) or not expected


TOKEN_LOSSES: list[LossConfig] = [
    LOSS,
    Aepo(kl_coef=0.01, balanced_tokens="high_entropy", mismatch="truncate"),
    Hapo(entropy_coef=0.01, mismatch="mask"),
    Cispo(kl_coef=0.01),
    Sft(),
]
OTHER_LOSSES: list[LossConfig] = [
    Gspo(clip_low=0.5, clip_high=0.5),
    Aepo(entropy_advantage="published"),
    LOSS.model_copy(update={"mismatch": "mask_sequence"}),
]


def test_a_step_is_that_of_recompute_for_every_loss_on_tokens(hf_folders: dict[str, Path]) -> None:
    (steps,) = run_ranks(both, make_config(hf_folders["qwen2_tied"], **PLAIN), trees(), TOKEN_LOSSES, 1.0)
    same(steps)


def test_in_bf16_a_step_is_that_of_recompute_but_for_rounding(hf_folders: dict[str, Path]) -> None:
    """0.5 % of a tensor's largest entry at most: a hidden state's gradient that rounds the other way, by 0.4 %, goes through all layers."""
    config = make_config(hf_folders["qwen2_tied"], parallel__tensor=2, model__dtype="bf16", **PLAIN)
    for steps in run_ranks(both, config, trees(), [LOSS], 1.0):
        same(steps, tolerance=0.02)


def updated(policy: Policy, groups: list[RolloutGroup]) -> tuple[int, float, float, dict[str, torch.Tensor]]:
    """(calls of the head that forms gradients in forward, loss, gradient norm, weights) of a step as `igpo train` takes it."""
    calls = mock.Mock(side_effect=model.linear_logprob_with_gradients)
    with mock.patch.object(model, "linear_logprob_with_gradients", calls):
        result = policy.optimizer_step(policy.forward_backward(rows_of(groups, policy.row_multiple), bound(LOSS, groups)))
    return calls.call_count, result.loss, result.grad_norm, {name: tensor.clone() for name, tensor in named_weights(policy)}


def test_the_setting_reaches_the_head_and_the_update_is_the_same(hf_folders: dict[str, Path]) -> None:
    configs = [make_config(hf_folders["qwen2_tied"], model__head_backward=name) for name in ("recompute", "in_forward")]
    ((calls, *numbers, weights),), ((new_calls, *new_numbers, new_weights),) = run_ranks_for_each(updated, configs, trees())
    assert calls == 0 and new_calls > 1
    assert new_numbers == pytest.approx(numbers, rel=1e-5)
    for name, tensor in weights.items():
        # Adam divides by the gradient's own size, so where a gradient is almost zero its rounding decides the sign.
        assert float(((new_weights[name] - tensor).abs() < 2e-4).float().mean()) > 0.99, name


def places(policy: Policy, groups: list[RolloutGroup]) -> list[set[str]]:
    """Where the host would wait for a GPU: by recompute, in forward."""
    found = []
    for in_forward in (False, True):
        step(policy, groups, LOSS, in_forward, probes=True)  # plans of attention are kept
        with host_waits(policy.ranks.device) as waits:
            step(policy, groups, LOSS, in_forward, probes=True)
        found.append(set(waits))
    return found


def test_the_host_waits_nowhere_that_it_does_not_by_recompute(hf_folders: dict[str, Path]) -> None:
    for recompute, in_forward in run_ranks(places, make_config(hf_folders["qwen3"], parallel__context=2, **PLAIN), trees()):
        assert in_forward == recompute and "context.part_of" in recompute


def in_blocks(loss: LossConfig, row: PackedRow, groups: list[RolloutGroup], blocks: Callable[[int], Iterator[slice]]) -> torch.Tensor:
    """[2, N] derivatives by log-probs and entropies, asked for block by block."""
    generator = torch.Generator().manual_seed(9)
    logprobs = row.old_logprobs + 0.4 * torch.randn(len(row.targets), generator=generator)
    entropy = torch.rand(len(row.targets), generator=generator)
    parts = [
        torch.stack(schedule.derivatives(bound(loss, groups), row, None, block, logprobs[block], entropy[block]))
        for block in blocks(len(row.targets))
    ]
    return torch.cat(parts, -1)


def one(count: int) -> Iterator[slice]:
    yield slice(0, count)


def several(count: int) -> Iterator[slice]:
    yield from (slice(start, min(start + 5, count)) for start in range(0, count, 5))


@pytest.mark.parametrize("loss", TOKEN_LOSSES + OTHER_LOSSES, ids=lambda loss: loss.name)
def test_what_the_check_takes_does_not_depend_on_the_blocks_and_what_it_refuses_does(loss: LossConfig) -> None:
    groups = trees()
    row = max(rows_of(groups, 1), key=lambda row: len(row.targets))
    whole, parts = in_blocks(loss, row, groups, one), in_blocks(loss, row, groups, several)
    assert float(whole.abs().max()) > 1e-4
    if loss in TOKEN_LOSSES:
        assert torch.equal(whole, parts)
    else:
        assert relative_error(parts, whole) > 1e-3


def swapped(*arguments: Any, whole: Callable[..., Any] = schedule.derivatives) -> tuple[torch.Tensor, torch.Tensor]:
    """The second block takes the first one's coefficients."""
    loss, row, numbers, which, *values = arguments
    if isinstance(which, slice) and which.start == SEVERAL and which.stop == 2 * SEVERAL:
        which = slice(0, SEVERAL)
    return whole(loss, row, numbers, which, *values)


def test_swapped_blocks_and_a_lost_scale_fail_the_comparison(hf_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(hf_folders["qwen2_tied"], **PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(schedule, "derivatives", swapped)
        (steps,) = run_ranks(both, config, trees(), [LOSS], 1.0)
        with pytest.raises(AssertionError, match=r"model\."):
            same(steps)
    backward = token_loss._WithGradients.backward
    monkeypatch.setattr(token_loss._WithGradients, "backward", staticmethod(lambda ctx, *grads: backward(ctx, torch.ones_like(grads[-1]))))
    (steps,) = run_ranks(both, config, trees(), [LOSS], 1.02)
    with pytest.raises(AssertionError, match=r"model\."):
        same(steps)
