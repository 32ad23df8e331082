"""Context parallelism beyond the layouts that test_layouts and test_families run: more ranks, losses on whole sequences, its mistakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import flattened, random_groups
from megatron.core import tensor_parallel
from test_layouts import (
    ROW_TOKENS,
    gradients,
    hf_step,
    one_step,
    reference_logprobs,
    relative_error,
    scored_nodes,
    with_off_policy_logprobs,
    worst,
)

from igpo_megatron.algorithms.losses.clipped import Gspo
from igpo_megatron.algorithms.losses.registry import objective, token_weight
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.policy import attention, context
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

TWO: dict[str, Any] = {"parallel__context": 2, "parallel__distributed_optimizer": False}
FOUR: dict[str, Any] = {"parallel__context": 4, "parallel__distributed_optimizer": False}


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "trees"])
def test_four_ranks_score_and_train_as_transformers_does(hf_folders: dict[str, Path], flat: bool) -> None:
    folder = hf_folders["qwen3"]
    scored = random_groups(seed=1)
    trained = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    if flat:
        scored, trained = flattened(scored), flattened(trained)
    found, *others = run_ranks(scored_nodes, make_config(folder, **FOUR), scored)
    assert worst(found, reference_logprobs(folder, scored)) < 1e-4 and others == [[]] * 3
    expected, loss = hf_step(folder, trained)
    for found, value, *_ in run_ranks(one_step, make_config(folder, **FOUR), trained):
        assert value == pytest.approx(loss, abs=1e-5)
        for key, tensor in found.items():
            assert relative_error(tensor, expected[key]) < 2e-5, key


def in_rank_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """Chunks left in the order of the ranks."""
    return gathered


def without_others_gradients(tokens: torch.Tensor, group: Any) -> torch.Tensor:
    """Keys and values gathered, and what the other ranks' queries say of them forgotten."""
    gathered = tensor_parallel.gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=False, group=group)
    return context.in_row_order(gathered, group.size())


def mistaken(policy: Policy, module: Any, name: str, mistake: Callable[..., Any], then: Callable[..., Any], *arguments: Any) -> Any:
    setattr(module, name, mistake)  # in this process, which ends with the test
    return then(policy, *arguments)


def test_chunks_in_the_wrong_order_fail_the_comparison_of_log_probs(hf_folders: dict[str, Path]) -> None:
    groups = random_groups(seed=1)
    config = make_config(hf_folders["qwen3"], **TWO)
    wrong = run_ranks(mistaken, config, context, "in_row_order", in_rank_order, scored_nodes, groups)[0]
    assert worst(wrong, reference_logprobs(hf_folders["qwen3"], groups)) > 1e-2


def test_key_and_value_gradients_that_are_not_summed_fail_the_comparison_of_gradients(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    expected, loss = hf_step(hf_folders["qwen3"], groups)
    config = make_config(hf_folders["qwen3"], **TWO)
    found, value, *_ = run_ranks(mistaken, config, attention, "gather_tokens", without_others_gradients, one_step, groups)[0]
    assert value == pytest.approx(loss, abs=1e-5)  # the loss cannot show it
    assert max(relative_error(tensor, expected[key]) for key, tensor in found.items()) > 1e-2


def gspo_gradients(policy: Policy, groups: list[RolloutGroup]) -> dict[str, torch.Tensor]:
    """Of a loss that weighs each trajectory by one ratio, and leaves out those that the engine saw too differently."""
    loss = Gspo(kl_coef=0.0, mismatch="mask_sequence")
    weight = partial(token_weight, loss.aggregation)
    rows = pack_for_training(groups, row_tokens=ROW_TOKENS, multiple=policy.row_multiple, token_weight=weight)
    policy.forward_backward(rows, partial(objective, counts=step_counts(groups), config=loss))
    return gradients(policy)


def test_a_loss_on_whole_sequences_sees_them_whole(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    generator = torch.Generator().manual_seed(5)
    for node in (node for group in groups for node in group.nodes if node.kind == "action"):
        noise = 0.5 * torch.randn(len(node.token_ids), generator=generator)
        node.old_logprobs = [-4.8] * len(node.token_ids)
        node.behavior_logprobs = (torch.tensor(node.old_logprobs) + noise).tolist()
    (expected,) = run_ranks(gspo_gradients, make_config(hf_folders["qwen3"], parallel__distributed_optimizer=False), groups)
    assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-4
    for found in run_ranks(gspo_gradients, make_config(hf_folders["qwen3"], **TWO), groups):
        for key, tensor in found.items():
            assert relative_error(tensor, expected[key]) < 2e-5, key
