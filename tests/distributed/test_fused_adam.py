"""The optimizer of CPU ranks: torch's fused Adam, against Adam with decoupled weight decay in fp64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from test_layouts import ROW_TOKENS, with_off_policy_logprobs

from igpo_megatron.algorithms.losses.registry import Ppo, objective, token_weight
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

Tensors = dict[str, torch.Tensor]


def three_steps(policy: Policy, groups: list[RolloutGroup]) -> tuple[list[Tensors], list[Tensors], set[bool | None]]:
    """fp32 weights before and after every step, the gradients of every step, and the form of every group of parameters."""
    rows = pack_for_training(groups, row_tokens=ROW_TOKENS, token_weight=partial(token_weight, "sequence_mean"))
    loss = partial(objective, counts=step_counts(groups), config=Ppo(kl_coef=0.0))
    (chunk,) = policy.chunks
    weights, gradients = [], []
    for _ in range(3):
        weights.append({name: parameter.detach().clone() for name, parameter in chunk.named_parameters()})
        sums = policy.forward_backward(rows, loss)
        gradients.append({name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()})
        assert not policy.optimizer_step(sums).skipped
    weights.append({name: parameter.detach().clone() for name, parameter in chunk.named_parameters()})
    return weights, gradients, {group["fused"] for group in policy.optimizer.param_groups if group["params"]}


def adam_in_fp64(before: Tensors, gradients: list[Tensors], clip: float, weight_decay: float) -> Tensors:
    """Weights after all steps with lr 0.01, betas (0.9, 0.95) and eps 1e-8; only matrices decay."""
    weights = {name: tensor.double() for name, tensor in before.items()}
    first, second = ({name: torch.zeros_like(tensor) for name, tensor in weights.items()} for _ in range(2))
    for step, found in enumerate(gradients, start=1):
        norm = sum(float(gradient.double().square().sum()) for gradient in found.values()) ** 0.5
        for name, weight in weights.items():
            gradient = found[name].double() * min(1.0, clip / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient.square()
            direction = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = weight_decay if weight.dim() > 1 else 0.0
            weights[name] = weight - 0.01 * (direction + decay * weight)
    return weights


@pytest.mark.parametrize("distributed", [True, False])
def test_three_steps_are_those_of_adam_in_fp64(hf_folders: dict[str, Path], distributed: bool) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    config = make_config(hf_folders["qwen2_tied"], parallel__distributed_optimizer=distributed, optim__clip_grad=0.5)
    ((weights, gradients, forms),) = run_ranks(three_steps, config, groups)
    assert forms == {True}
    expected = adam_in_fp64(weights[0], gradients, clip=0.5, weight_decay=0.01)
    undecayed = adam_in_fp64(weights[0], gradients, clip=0.5, weight_decay=0.0)
    for name, found in weights[-1].items():
        settled = gradients[0][name].abs() > 1e-6  # elsewhere the sign of a rounding error decides
        assert (found - expected[name]).abs()[settled].max() < 2e-6, name
        if found.dim() > 1:
            assert (found - undecayed[name]).abs().max() > 1e-5, name
