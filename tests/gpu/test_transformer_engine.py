"""TransformerEngine's layers with our attention: log-probs and gradients are those of the local layers.

pytest tests/gpu/test_transformer_engine.py        without a GPU the comparison itself runs on CPU, of local layers with themselves
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_hf_folder, run_one_rank
from groups import random_groups
from test_layouts import gradients, relative_error, row_loss, with_off_policy_logprobs

from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy.attention import TreeAttention
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

MISSING = [
    what
    for what, there in (
        ("a GPU", torch.cuda.is_available()),
        ("the package transformer_engine", importlib.util.find_spec("transformer_engine") is not None),
    )
    if not there
]
BOUNDS = {"fp32": 2e-3, "bf16": 0.15}
"""Largest difference of log-probs: TransformerEngine's fp32 matmuls may run in TF32."""

Found = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""(log-probs of all targets, gradients under HF names), on the host."""


def scores_and_gradients(policy: Policy, groups: list[RolloutGroup]) -> Found:
    assert all(type(layer.self_attention.core_attention) is TreeAttention for layer in policy.chunks[0].decoder.layers)
    logprobs = torch.cat(policy.log_probs(pack_for_scoring(groups, row_tokens=60)))
    rows = pack_for_training(groups, row_tokens=60, token_weight=lambda tokens: 1.0)
    policy.forward_backward(rows, partial(row_loss, step_counts(groups)))
    return logprobs, {name: tensor.float().cpu() for name, tensor in gradients(policy).items()}


def by_one_rank(folder: Path, backend: str, dtype: str, groups: list[RolloutGroup], device: str) -> Found:
    config = make_config(folder, model__backend=backend, model__dtype=dtype, run__device=device, parallel__distributed_optimizer=False)
    found: Found = run_one_rank(scores_and_gradients, config, groups)
    return found


def check(folder: Path, backend: str, dtype: str, device: str) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    compare(by_one_rank(folder, backend, dtype, groups, device), by_one_rank(folder, "local", dtype, groups, device), dtype)


def compare(found: Found, expected: Found, dtype: str) -> None:
    assert float((found[0] - expected[0]).abs().max()) < BOUNDS[dtype]
    assert set(found[1]) == set(expected[1])
    for name, tensor in found[1].items():
        assert relative_error(tensor, expected[1][name]) < (0.02 if dtype == "fp32" else 0.3), name


@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen3", "llama3", "qwen3_moe", "mixtral"])
def test_transformer_engines_layers_score_and_learn_as_the_local_ones(tmp_path: Path, architecture: str, dtype: str) -> None:
    check(make_hf_folder(tmp_path / architecture, architecture), "te", dtype, "cuda")


def test_local_layers_score_and_learn_as_themselves(tmp_path: Path) -> None:
    check(make_hf_folder(tmp_path / "qwen3", "qwen3"), "local", "fp32", "cpu")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_wrong_numbers_fail_the_comparison(dtype: str) -> None:
    """A token that is off by a fifth of a nat; a gradient of another tensor, or one that lost a third."""
    logprobs = torch.linspace(-3, -1, 5)
    gradients = {"a": torch.linspace(-1, 1, 6), "b": torch.linspace(2, 1, 6)}
    right = (logprobs, gradients)
    compare(right, right, dtype)
    off = logprobs + 0.2 * torch.eye(5)[2]
    for wrong in ((off, gradients), (logprobs, {**gradients, "b": gradients["a"]}), (logprobs, {**gradients, "a": 2 / 3 * gradients["a"]})):
        with pytest.raises(AssertionError):
            compare(wrong, right, dtype)
