"""A policy with local layers on CUDA: compared with the CPU, whose chains of SDPA are compared with transformers elsewhere.

pytest tests/gpu/test_policy_gpu.py        without a GPU the same bodies run on CPU, on FlexAttention, so that none is new to one

Prepared, not measured. On CUDA the time goes into compiling: a graph of FlexAttention is taken to cost 6 s with its gradient and 2.5 s
without. So the lengths share buckets, the models share a shape of heads, and the tests share graphs, 11 with a gradient and 2 without:
about 70 s, and 90 s in all. The largest gaps are recorded as properties of the tests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, make_hf_folder, run_one_rank
from host_waits import host_waits
from parity import ROW_TOKENS, Numbers, by_flex_attention, compare, groups, measured
from test_device import CASES, COUNTED_ON_HOST, HELD_BY_HOST, loss_of
from test_tree_attention import dense_attention, random_row

from igpo_megatron.config.schema import Config
from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training
from igpo_megatron.policy import attention, host_memory
from igpo_megatron.policy.attention import compiled_flex_attention, flex_tree_attention
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

Record = Callable[[str, object], None]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the GPU")
DEVICES = [pytest.param("cpu", marks=without_gpu), pytest.param("cuda", marks=needs_gpu)]
HIDDEN = 128
"""So that the heads of every model are 32 wide, and one compiled attention does for all of a dtype."""

MODELS = [("qwen3", "bf16"), ("qwen3_moe", "fp32")]
MORE_MODELS = [("qwen2_tied", "fp32"), ("llama3", "fp32")]
"""On CUDA alone: on CPU nothing of them is new."""

BOUNDS = {"fp32": (1e-3, 1e-3), "bf16": (0.1, 0.1)}
"""Log-probs in nats, gradients by the largest entry of each tensor. On CPU fp32 agrees within 1e-5, bf16 within 0.04 and 0.05."""


def configured(folder: Path, device: str, **settings: Any) -> Config:
    return make_config(folder, model__backend="local", run__device=device, parallel__distributed_optimizer=False, **settings)


def by_one_rank(function: Callable[..., Any], folder: Path, device: str, *arguments: Any, **settings: Any) -> Any:
    return run_one_rank(function, configured(folder, device, **settings), *arguments)


@pytest.mark.parametrize(
    ("architecture", "dtype", "device"),
    [pytest.param(*model, "cpu", marks=without_gpu) for model in MODELS]
    + [pytest.param(*model, "cuda", marks=needs_gpu) for model in MODELS + MORE_MODELS],
)
def test_flex_attention_scores_and_learns_as_chains_of_sdpa_do(
    tmp_path: Path, architecture: str, dtype: str, device: str, record_property: Record
) -> None:
    """Log-probs, gradients, loss, and the weights after a step of the optimizer; what left for host memory comes back bit for bit."""
    folder = make_hf_folder(tmp_path / architecture, architecture, hidden=HIDDEN)
    expected: Numbers = by_one_rank(measured, folder, "cpu", groups(), model__dtype=dtype)
    found = by_one_rank(measured if device == "cuda" else by_flex_attention, folder, device, groups(), model__dtype=dtype)
    rate = configured(folder, device).optim.lr
    gaps = compare(found, expected, rate, *BOUNDS[dtype])
    record_property("logprob_gap_nats", gaps.logprob)
    record_property("gradient_gap", gaps.gradient)
    record_property("weight_gap_steps", gaps.weight)
    record_property("loss_gap", abs(found.loss - expected.loss))


@pytest.mark.parametrize("wrong", ["logprobs", "again", "gradients", "weights", "loss"])
def test_a_wrong_number_fails_the_comparison(wrong: str) -> None:
    """One number beyond its bound; a weight by the step that a wrong sign takes it the other way."""
    rate, names = 0.01, ("a", "b")
    ones = {name: torch.ones(2) for name in names}
    right = Numbers(torch.zeros(3), torch.zeros(3), gradients=ones, loss=1.0, grad_norm=1.0, weights=ones)
    off = {
        "logprobs": torch.tensor([0.0, 0.2, 0.0]),
        "again": torch.tensor([0.0, 0.02, 0.0]),
        "gradients": {"a": torch.ones(2), "b": torch.tensor([1.0, 0.8])},
        "weights": {"a": torch.ones(2), "b": torch.tensor([1.0, 1.0 - 2 * rate])},
        "loss": 1.5,
    }[wrong]
    compare(right, right, rate, *BOUNDS["bf16"])
    with pytest.raises(AssertionError):
        compare(replace(right, **{wrong: off}), right, rate, *BOUNDS["bf16"])


def waits_of_rows(policy: Policy, trees: list[RolloutGroup], names: list[str], scores: bool) -> dict[str, list[Counter[str]]]:
    """Of a step by each loss (and one scoring) over two rows and over four: where the host waited."""
    rows = pack_for_training(trees, row_tokens=60, multiple=ROW_TOKENS, token_weight=lambda tokens: 1.0)
    scoring = pack_for_scoring(trees, row_tokens=60, multiple=ROW_TOKENS)
    assert min(len(rows), len(scoring)) >= 4 and scoring[0].probed is not None

    def score(count: int) -> Any:
        return policy.log_probs(scoring[:count], with_entropy=True)

    def step(loss: Callable[..., Any], count: int) -> Any:
        return policy.optimizer_step(policy.forward_backward(rows[:count], loss))

    works = {"scoring": score} if scores else {}
    works |= {name: partial(step, loss_of(CASES[name], trees)) for name in names}
    found: dict[str, list[Counter[str]]] = {}
    for name, work in works.items():
        work(4)  # kernels are compiled, and what stays on the device is moved there
        found[name] = []
        for count in (2, 4):
            with host_waits(policy.ranks.device) as waited:
                work(count)
            found[name].append(Counter({at: number for at, number in waited.items() if at not in COUNTED_ON_HOST | HELD_BY_HOST}))
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_waits_as_often_for_two_rows_as_for_four(tmp_path: Path, device: str, record_property: Record) -> None:
    """What remains is a step's: the metrics and the gradient's norm are read, and with several ranks they are exchanged."""
    folder = make_hf_folder(tmp_path / "model", "qwen2_tied", hidden=HIDDEN)
    names = list(CASES) if device == "cuda" else ["ppo", "aepo, as published", "gspo"]
    # Probes are scored at 1, so rows are split by what is a probe.
    # Small steps, as one without a finite gradient would be skipped.
    found = by_one_rank(waits_of_rows, folder, device, groups(), names, True, rollout__temperature=0.7, optim__lr=1e-6)
    record_property("syncs_per_row", max((many.total() - few.total()) / 2 for few, many in found.values()))
    record_property("syncs_per_step", max(few.total() for few, _ in found.values()))
    assert found["ppo"][0].total() > 0  # the gradient's norm
    assert {name: many - few for name, (few, many) in found.items()} == {name: Counter() for name in found}


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_a_mixture_waits_for_megatrons_experts_alone(tmp_path: Path, device: str, record_property: Record) -> None:
    """Each layer asks how many tokens each expert has, and Megatron 0.16 without TransformerEngine also as it permutes them."""
    folder = make_hf_folder(tmp_path / "model", "qwen3_moe", hidden=HIDDEN)
    few, many = by_one_rank(waits_of_rows, folder, device, groups(), ["ppo"], False)["ppo"]
    record_property("syncs_per_row_and_layer", (many.total() - few.total()) / 2 / 2)
    assert {place.split(".")[0] for place in many - few} <= {"moe_utils", "token_dispatcher", "experts"}


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_hold_what_was_there_when_they_were_asked_for(
    device: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """The host goes on at once: it overwrites its tensors and drops the buffers while the device is still busy with something else."""
    rounds, numbers = (64, 2**20) if device == "cuda" else (4, 2**10)
    if device == "cpu":
        monkeypatch.setattr(host_memory, "_staging", lambda size: torch.empty(size, dtype=torch.uint8))
    place = torch.device(device)
    source = torch.empty(numbers, dtype=torch.int64)
    if device == "cuda":
        torch.cuda._sleep(200_000_000)
    copies = []
    for number in range(rounds):
        copies.append(host_memory._copied([source.fill_(number), source[:3] + number], place))
    source.fill_(-1)
    for number, (whole, part) in enumerate(copies):
        assert whole.device.type == device and bool((whole == number).all()) and part.tolist() == [2 * number] * 3

    large = torch.zeros(2**28 if device == "cuda" else 2**16, dtype=torch.uint8)
    host_memory._copied([large], place)  # page-locked once
    started = time.perf_counter()
    for _ in range(4):
        host_memory._copied([large], place)
    if device == "cuda":
        torch.cuda.synchronize()
    record_property("upload_gb_s", 4 * large.nbytes / (time.perf_counter() - started) / 1e9)


HEADS = [(28, 4, 128), (14, 2, 64), (9, 3, 64)]
"""(query heads, key heads, width) of models of 7B, of 0.5B and of 135M."""

LENGTHS = [700, 768, 129, 200, 256, 730, 1300, 1400, 1536, 2100, 2500, 3072]
"""In four buckets, of each its longest."""

COMPILED: set[tuple[object, ...]] = set()
"""What this process has compiled an attention with gradients for."""


def graphs_of_this_process() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def tree_row(length: int) -> torch.Tensor:
    row = (random_row(length, trees=4, tokens=length) + [length] * length)[:length]
    return torch.tensor([min(end, length) for end in row])


def results(
    attend: Callable[..., torch.Tensor], on_host: list[torch.Tensor], ends: torch.Tensor, device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Output and the gradients of queries, keys and values."""
    *tensors, upstream = (tensor.to(device, dtype) for tensor in on_host)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = attend(*tensors, ends, tensors[0].shape[-1] ** -0.5)
    return [part.double() for part in (output.detach(), *torch.autograd.grad((output * upstream).sum(), tensors))]


def gap(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((here - there).abs().max() / there.abs().max()) for here, there in zip(found, expected, strict=True))


def check_attention(
    heads: tuple[int, int, int], dtype: torch.dtype, lengths: list[int], device: str, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """Compiled FlexAttention against dense attention in fp64 of the same numbers, one graph for each bucket of lengths."""
    attend: Callable[..., torch.Tensor] = flex_tree_attention
    if device == "cpu":
        # The graphs are those of CUDA; what is not there is the compiler behind them.
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
        monkeypatch.setattr(attention, "BLOCK", 16)
        attention._block_mask.cache_clear()
        attend = partial(flex_tree_attention, attend=compiled_flex_attention("eager"))
        lengths = [length // 8 for length in lengths]
    wanted = {(heads, dtype, device, attention.bucket(length)) for length in lengths}
    fresh = wanted - COMPILED
    COMPILED.update(wanted)
    before, started = graphs_of_this_process(), time.perf_counter()
    count, kv_count, width = heads
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for length in lengths:
        ends = tree_row(length)
        on_host = [torch.randn(length, number, width, generator=generator).to(dtype) for number in (count, kv_count, kv_count, count)]
        found = results(attend, on_host, ends, device, dtype)
        # The dense reference reads the row where its scores are; flex, as in the model, on the host.
        expected = results(dense_attention, on_host, ends.to(device), device, torch.float64)
        worst = max(worst, gap(found, expected))
    one_chain = torch.full_like(ends, length)
    wrong = gap(results(attend, on_host, one_chain, device, dtype), expected)
    graphs = graphs_of_this_process() - before
    record("attention_gap", worst)
    record("attention_graphs", graphs)
    record("attention_seconds", round(time.perf_counter() - started, 1))
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    assert worst < bound < 5 * bound < wrong
    assert graphs == len(fresh)
    if device == "cpu":
        attention._block_mask.cache_clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}-{heads[1]}")
def test_attention_over_trees_equals_dense_attention_for_grouped_queries(
    heads: tuple[int, int, int], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Two lengths, one of them its bucket's longest, in values and in gradients."""
    check_attention(heads, dtype, LENGTHS[:2], device, monkeypatch, record_property)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_over_trees_of_twelve_lengths_compiles_a_graph_for_each_bucket(
    device: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    assert len({attention.bucket(length) for length in LENGTHS}) == 4 and len(LENGTHS) == 12
    check_attention((14, 2, 64), torch.bfloat16, LENGTHS, device, monkeypatch, record_property)
