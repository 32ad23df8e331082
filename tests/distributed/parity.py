"""One policy's whole path over trees that span several blocks of the mask, as numbers to compare another device or attention with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from groups import random_groups
from test_layouts import gradients, relative_error, with_off_policy_logprobs

from checkpoint_conversion.architectures import rules_for
from igpo_megatron.algorithms.losses.registry import Ppo, objective
from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy import attention
from igpo_megatron.policy.model import global_names
from igpo_megatron.policy.offload import Offload, _bytes_of, _kept
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

LOSS = Ppo(kl_coef=0.01, entropy_coef=0.003, aggregation="sequence_mean", clip_low=2.0, clip_high=1e6, dual_clip=None)
"""Clips nothing: of two right answers in bf16 one would clip a token that the other leaves, and their gradients would part."""

ROW_TOKENS = 320
"""Three blocks of the mask, so that some are skipped, some whole and some mixed. All rows have it: each length takes time to compile."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """On the host, in fp32."""

    logprobs: torch.Tensor
    """[N] of all targets, probes included."""

    again: torch.Tensor
    """[N] after the policy has left its device and come back."""

    gradients: dict[str, torch.Tensor]
    """Under HF names."""

    loss: float
    grad_norm: float
    """Of one optimizer step."""

    weights: dict[str, torch.Tensor]
    """What the optimizer holds after the step, fp32, under HF names."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Largest differences between two `Numbers`."""

    logprob: float
    """Nats."""

    gradient: float
    """Of the largest entry of its tensor."""

    weight: float
    """Of a step of the optimizer, where the gradient is clear of rounding."""


def groups() -> list[RolloutGroup]:
    """Trees of prompts, turns, results and probes."""
    return with_off_policy_logprobs(random_groups(seed=2, count=12))


def measured(policy: Policy, trees: list[RolloutGroup]) -> Numbers:
    """Score, leave and come back, score again, accumulate gradients, step, leave and come back."""
    scoring = pack_for_scoring(trees, row_tokens=ROW_TOKENS, multiple=ROW_TOKENS)
    logprobs = torch.cat(policy.log_probs(scoring))
    leave_and_come_back(policy)
    again = torch.cat(policy.log_probs(scoring))
    rows = pack_for_training(trees, row_tokens=ROW_TOKENS, multiple=ROW_TOKENS, token_weight=lambda tokens: 1.0)
    assert {row.num_tokens for row in [*rows, *scoring]} == {ROW_TOKENS} and ROW_TOKENS > 2 * attention.BLOCK
    loss = partial(objective, counts=step_counts(trees), config=LOSS)
    policy.forward_backward(rows, loss)
    found = {name: tensor.float().cpu() for name, tensor in gradients(policy).items()}
    start = optimized(policy)
    result = policy.optimizer_step(policy.forward_backward(rows, loss))
    leave_and_come_back(policy)
    weights = optimized(policy)
    assert not any(torch.equal(start[name], tensor) for name, tensor in weights.items()), "a tensor did not learn"
    return Numbers(logprobs, again, found, result.loss, result.grad_norm, weights)


def optimized(policy: Policy) -> dict[str, torch.Tensor]:
    """What one rank's optimizer steps on: in bf16 its own fp32 copies of the weights. Copied to the host, under HF names."""
    rules = rules_for(policy.shape, policy.config.model.vocab_multiple)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in global_names(policy.chunks):
        main = getattr(parameter, "main_param", parameter).detach().view_as(parameter).float().cpu().clone()
        found |= dict(zip(rules[name].exports, rules[name].to_hf(main), strict=bool(rules[name].exports)))
    return found


def leave_and_come_back(policy: Policy) -> None:
    """Weights, main parameters and moments are emptied, and are the same bits afterwards."""
    kept = list({storage.data_ptr(): storage for storage in _kept(policy)}.values())
    before = [_bytes_of(storage).cpu().clone() for storage in kept]
    on_gpu = policy.ranks.device.type == "cuda"
    allocated = torch.cuda.memory_allocated() if on_gpu else 0
    offload = Offload(policy)
    given_back = offload.leave()
    assert all(storage.nbytes() == 0 for storage in kept)
    assert given_back >= sum(len(held) for held in before)
    assert not on_gpu or allocated - torch.cuda.memory_allocated() >= given_back
    offload.come_back()
    assert all(torch.equal(_bytes_of(storage).cpu(), held) for storage, held in zip(kept, before, strict=True))


@contextmanager
def flex_attention_on_cpu() -> Iterator[None]:
    """What runs on CUDA, uncompiled; torch refuses its gradients on CPU, though it computes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
        patch.setattr(attention, "chain_attention", attention.flex_tree_attention)
        yield


def by_flex_attention(policy: Policy, trees: list[RolloutGroup]) -> Numbers:
    """`measured` on CPU with the attention of CUDA."""
    with flex_attention_on_cpu():
        return measured(policy, trees)


def compare(found: Numbers, expected: Numbers, rate: float, logprob: float, gradient: float) -> Gaps:
    """Differ by no more than `logprob` (nats) and `gradient` (of the largest entry of each tensor); weights by a tenth of a step.

    Adam's first step is the learning rate `rate` in the direction of the gradient's sign, so weights say nothing where the sign is open.
    """
    # Not bit for bit: on CUDA the outputs of a token's experts are added up in any order.
    assert float((found.again - found.logprobs).abs().max()) < logprob / 10
    assert set(found.gradients) == set(expected.gradients) and set(found.weights) == set(expected.weights)
    gaps = Gaps(
        logprob=float((found.logprobs - expected.logprobs).abs().max()),
        gradient=max(relative_error(tensor, expected.gradients[name]) for name, tensor in found.gradients.items()),
        weight=max(weight_gap(found, expected, name, gradient) / rate for name in found.gradients),
    )
    assert gaps.logprob < logprob and gaps.gradient < gradient and gaps.weight < 0.1, gaps
    assert found.loss == pytest.approx(expected.loss, rel=gradient, abs=gradient)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=gradient)
    return gaps


def weight_gap(found: Numbers, expected: Numbers, name: str, gradient: float) -> float:
    """Largest difference of updated weights whose gradient is larger than two right ones may differ."""
    slope = expected.gradients[name].abs()
    settled = slope > gradient * slope.max()
    return float((found.weights[name] - expected.weights[name])[settled].abs().max()) if settled.any() else 0.0
