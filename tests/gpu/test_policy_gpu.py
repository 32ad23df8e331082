"""A policy with local layers and FlexAttention: on CUDA as on CPU, where chains of SDPA are compared with transformers elsewhere.

pytest tests/gpu/test_policy_gpu.py        without a GPU the same bodies run on CPU, on FlexAttention, so that none is new to one
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_config, make_hf_folder, run_ranks
from parity import Numbers, by_flex_attention, compare, groups, measured
from test_tree_attention import dense_attention, random_row

from igpo_megatron.actor import parallel
from igpo_megatron.actor.attention import flex_tree_attention
from igpo_megatron.actor.policy import Policy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
MODELS = [("qwen3", "bf16"), ("qwen3_moe", "fp32")]
MORE_MODELS = [("qwen2_tied", "fp32"), ("qwen2_tied", "bf16"), ("llama3", "fp32"), ("mixtral", "fp32")]
"""On CUDA alone: on CPU nothing of them is new."""

BOUNDS = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.1)}
"""Log-probs in nats, gradients by the largest entry of each tensor. On CPU fp32 agrees within 1e-5, bf16 within 0.03 and 0.02."""


def by_cuda(folder: Path, dtype: str) -> Numbers:
    """`measured` in this process; CPU ranks are forked later, so nothing of it may stay."""
    config = make_config(folder, model__backend="local", model__dtype=dtype, run__device="cuda", parallel__distributed_optimizer=False)
    try:
        return measured(Policy(config, parallel.init(config)), groups())
    finally:
        parallel.shutdown()


@pytest.mark.parametrize(
    ("architecture", "dtype", "device"),
    [(*model, "cpu") for model in MODELS] + [pytest.param(*model, "cuda", marks=needs_gpu) for model in MODELS + MORE_MODELS],
)
def test_flex_attention_scores_and_learns_as_chains_of_sdpa_do(tmp_path: Path, architecture: str, dtype: str, device: str) -> None:
    folder = make_hf_folder(tmp_path / architecture, architecture)
    on_cpu = make_config(folder, model__backend="local", model__dtype=dtype, parallel__distributed_optimizer=False)
    (expected,) = run_ranks(measured, on_cpu, groups())
    found = by_cuda(folder, dtype) if device == "cuda" else run_ranks(by_flex_attention, on_cpu, groups())[0]
    compare(found, expected, *BOUNDS[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_flex_attention_over_trees_of_many_lengths_equals_dense_attention(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped queries as in a model of 7B on CUDA, fewer and shorter on CPU. The reference takes the same numbers in fp64."""
    heads, kv_heads, width = (28, 4, 128) if device == "cuda" else (4, 2, 16)
    lengths = (100, 128, 130, 300, 500, 700, 1000, 1300, 1700, 2500, 3500, 5000) if device == "cuda" else (100, 300)
    if device == "cpu":
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        row = (random_row(length, trees=4, tokens=length) + [length] * length)[:length]
        ends = torch.tensor([min(end, length) for end in row])
        on_host = [torch.randn(length, count, width, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads, heads)]
        results = []
        for attend, place, kind in ((flex_tree_attention, device, dtype), (dense_attention, device, torch.float64)):
            *tensors, upstream = (tensor.to(place, kind) for tensor in on_host)
            tensors = [tensor.requires_grad_() for tensor in tensors]
            # The dense reference reads the row where its scores are; flex, as in the model, on the host.
            output = attend(*tensors, ends.to(place) if attend is dense_attention else ends, width**-0.5)
            gradients = torch.autograd.grad((output * upstream).sum(), tensors)
            results.append([part.double() for part in (output.detach(), *gradients)])
        for found, expected in zip(*results, strict=True):
            assert float((found - expected).abs().max() / expected.abs().max()) < bound, length
