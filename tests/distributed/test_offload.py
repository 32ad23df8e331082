"""Leaving the device and coming back changes nothing, whatever the layout and whichever tensors are views of others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from host_pages import Driver
from test_layouts import ROW_TOKENS, with_off_policy_logprobs

from igpo_megatron.packing.tree import pack_for_scoring
from igpo_megatron.policy.host_memory import ALIGNMENT
from igpo_megatron.policy.offload import Offload
from igpo_megatron.policy.policy import Policy
from igpo_megatron.policy.weight_sync import named_weights
from igpo_megatron.training.step import minibatches
from igpo_megatron.types import RolloutGroup
from igpo_megatron.weights.store import SharedWeights

LAYOUTS: dict[str, dict[str, Any]] = {
    "fp32": {"parallel__tensor": 2},
    "fp32, whole optimizer": {"parallel__distributed_optimizer": False},
    "bf16, sharded optimizer": {"model__dtype": "bf16", "parallel__data": 2},
    "experts": {"parallel__expert": 2, "parallel__data": 2},
}


def trained_once(policy: Policy, groups: list[RolloutGroup]) -> None:
    for rows, objective in minibatches(policy, groups):
        policy.optimizer_step(policy.forward_backward(rows, objective))


def trained(policy: Policy, groups: list[RolloutGroup], leaves: bool) -> tuple[dict[str, torch.Tensor], int, bool]:
    """(weights after two steps, bytes given back at most, emptied while away), with or without leaving the device before each step."""
    away, given_back, emptied = Offload(policy), 0, False
    for _ in range(2):
        if leaves:
            given_back = max(given_back, away.leave())
            emptied = away.is_away and all(p.untyped_storage().nbytes() == 0 for chunk in policy.chunks for p in chunk.parameters())
            away.come_back()
            assert not away.is_away
        trained_once(policy, groups)
        # An export must not pin what is to be emptied next.
        store = SharedWeights()
        store.write(0, [*named_weights(policy)], 0)
        store.close()
    return {name: tensor.clone() for name, tensor in named_weights(policy)}, given_back, emptied


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_policy_that_left_the_device_trains_on_bit_for_bit(hf_folders: dict[str, Path], layout: dict[str, Any]) -> None:
    folder = hf_folders["qwen3_moe" if "parallel__expert" in layout else "qwen2"]
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    config = make_config(folder, **layout)
    stayed = run_ranks(partial(trained, leaves=False), config, groups)[0]
    left = run_ranks(partial(trained, leaves=True), config, groups)[0]
    assert stayed[0].keys() == left[0].keys()
    assert all(torch.equal(stayed[0][name], left[0][name]) for name in stayed[0])
    assert not stayed[2] and left[2]
    parameters = sum(tensor.numel() for tensor in stayed[0].values())
    ranks = layout.get("parallel__tensor", layout.get("parallel__data", 1))
    # Weights and fp32 gradients, and two moments of what this rank's optimizer holds; in fp32 its parameters are the weights themselves.
    assert left[1] > parameters / ranks * (4 + 4)


def locked(policy: Policy, groups: list[RolloutGroup]) -> list[tuple[list[tuple[str, int]], int]]:
    """(pages locked and unlocked, bytes that must be kept), of leaving before the first step and twice after it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        driver = Driver()
        calls = driver.calls
        patch.setattr(torch.cuda, "cudart", lambda: driver)
        away = Offload(policy)
        away._page_locks = True  # as on CUDA
        for _ in range(3):
            calls.clear()
            away.leave()
            kept = sum(host.nbytes for _, host in away._away if isinstance(host, torch.Tensor))
            away.come_back()
            found.append((list(calls), kept))
            trained_once(policy, groups)
    return found


def test_host_memory_is_locked_once_and_is_no_more_than_what_leaves(hf_folders: dict[str, Path]) -> None:
    """Before the first step there are no moments, so the second time there is more to keep."""
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    ((before, first, again),) = run_ranks(locked, make_config(hf_folders["qwen2"], parallel__distributed_optimizer=False), groups)
    ((_, small),), kept = before
    assert kept <= small < kept + 100 * ALIGNMENT
    (unlocked, (_, large)), kept = first
    assert unlocked == ("unlock", small) and kept <= large < kept + 200 * ALIGNMENT and large > 2 * small
    assert again == ([], kept)


def as_at_the_start(policy: Policy, groups: list[RolloutGroup]) -> tuple[bool, bool, bool]:
    """After a step: does it score otherwise than before, inside `as_reference` as before, and then as after the step?"""
    rows = pack_for_scoring(groups, row_tokens=ROW_TOKENS)

    def score() -> torch.Tensor:
        return torch.cat(policy.log_probs(rows))

    start = score()
    trained_once(policy, groups)
    learnt = score()
    with policy.as_reference():
        reference = score()
    return not torch.equal(learnt, start), torch.equal(reference, start), torch.equal(score(), learnt)


def test_the_reference_scores_as_the_policy_did_at_the_start(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    for config in (make_config(hf_folders["qwen2_tied"], loss__kl_coef=0.01, model__dtype=dtype) for dtype in ("fp32", "bf16")):
        assert run_ranks(as_at_the_start, config, groups) == [(True, True, True)]
