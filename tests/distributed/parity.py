"""One policy's whole path over trees that span several blocks of the mask, as numbers to compare another device or attention with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from groups import random_groups
from test_layouts import gradients, relative_error, row_loss, with_off_policy_logprobs

from igpo_megatron.actor import attention, schedule
from igpo_megatron.actor.offload import Offload
from igpo_megatron.actor.policy import Policy
from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.types import RolloutGroup

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


def groups() -> list[RolloutGroup]:
    """Trees of prompts, turns, results and probes."""
    return with_off_policy_logprobs(random_groups(seed=2, count=12))


def measured(policy: Policy, trees: list[RolloutGroup]) -> Numbers:
    """Score, leave and come back, score again, accumulate gradients, step."""
    scoring = pack_for_scoring(trees, row_tokens=ROW_TOKENS, multiple=ROW_TOKENS)
    logprobs = torch.cat(policy.log_probs(scoring))
    offload = Offload(policy)
    offload.leave()
    offload.come_back()
    again = torch.cat(policy.log_probs(scoring))
    rows = pack_for_training(trees, row_tokens=ROW_TOKENS, multiple=ROW_TOKENS, token_weight=lambda tokens: 1.0)
    assert {row.num_tokens for row in [*rows, *scoring]} == {ROW_TOKENS} and ROW_TOKENS > 2 * attention.BLOCK
    loss = partial(row_loss, step_counts(trees))
    policy.zero_gradients()
    schedule.forward_backward(policy.wrapped, rows, loss, temperature=1.0, device=policy.ranks.device)
    found = {name: tensor.float().cpu() for name, tensor in gradients(policy).items()}
    result = policy.train_step(rows, loss)
    return Numbers(logprobs, again, found, result.loss, result.grad_norm)


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


def compare(found: Numbers, expected: Numbers, logprob: float, gradient: float) -> None:
    """Differ by no more than `logprob` (nats) and `gradient` (of the largest entry of each tensor)."""
    # Not bit for bit: on CUDA the outputs of a token's experts are added up in any order.
    assert float((found.again - found.logprobs).abs().max()) < logprob / 10
    assert float((found.logprobs - expected.logprobs).abs().max()) < logprob
    assert set(found.gradients) == set(expected.gradients)
    for name, tensor in found.gradients.items():
        assert relative_error(tensor, expected.gradients[name]) < gradient, name
    assert found.loss == pytest.approx(expected.loss, rel=gradient, abs=gradient)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=gradient)
