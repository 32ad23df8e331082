"""A real language model of 135 M parameters at every layout, in fp32 and bf16: log-probs and gradients are those of transformers in fp32.

The models of test_layouts and test_families are small and random. This one is deep and sure of its words: it shows what rounding and rope
do then. Every bound stands beside wrong answers that it refuses.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks, run_ranks_for_each
from language_model import BOUNDS, HEAD_DIM, ROPE_BASE, conversations, gap_between, language_model
from test_layouts import (
    LOSS,
    gradients,
    hf_step,
    reference_logprobs,
    relative_error,
    row_loss,
    scored_nodes,
    with_off_policy_logprobs,
)

from checkpoint_conversion import gguf_to_hf
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoint_conversion.gguf_file import read_gguf
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import ConversionError
from igpo_megatron.algorithms.losses.registry import token_weight
from igpo_megatron.packing.tree import PackedRow, pack_for_scoring, pack_for_training, per_node, step_counts
from igpo_megatron.policy.model import global_names
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp3": {"parallel__tensor": 3},
    "pp2": {"parallel__pipeline": 2},
    "cp2": {"parallel__context": 2},
    "dp2": {"parallel__data": 2},
}
"""Nine heads: three ranks can share a layer, two cannot."""

STARTED_TOGETHER = (("tp1",), ("pp2", "cp2", "dp2"), ("tp3",))
"""Layouts of as many ranks."""

ROW_TOKENS = 272
"""A row for each question, so that two replicas have one each."""

GRADIENTS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.14.mlp.down_proj.weight",
    "model.layers.15.mlp.down_proj.weight",
    "model.layers.29.input_layernorm.weight",
    "model.norm.weight",
)
FEW_ROWS = 400
"""Of each; the embedding has 113 MB. Its first rows are control tokens and the commonest pieces of words."""

GRADIENT_BOUND = 5e-4
"""Of the largest entry of a tensor, in fp32; measured: 1e-4."""

Scores = list[list[float]]
"""Log-probs of each action and probe node."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder() -> Path:
    return language_model()


@pytest.fixture(scope="module")
def trees(folder: Path) -> list[RolloutGroup]:
    return with_off_policy_logprobs(conversations(folder))


@pytest.fixture(scope="module")
def expected(folder: Path, trees: list[RolloutGroup]) -> Scores:
    return reference_logprobs(folder, trees)


# ---- log-probs


def scores(policy: Policy, groups: list[RolloutGroup]) -> Scores:
    return scored_nodes(policy, groups, row_tokens=ROW_TOKENS)


@pytest.fixture(scope="module")
def found(folder: Path, trees: list[RolloutGroup]) -> dict[tuple[str, str], Scores]:
    """(layout, dtype) -> scores."""
    results: dict[tuple[str, str], Scores] = {}
    for layouts in STARTED_TOGETHER:
        kinds = [(layout, dtype) for layout in layouts for dtype in BOUNDS]
        configs = [make_config(folder, model__dtype=dtype, **LAYOUTS[layout]) for layout, dtype in kinds]
        of_each = run_ranks_for_each(scores, configs, trees)
        results |= {kind: ranks[0] for kind, ranks in zip(kinds, of_each, strict=True)}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_log_probs_are_those_of_transformers(found: dict[tuple[str, str], Scores], expected: Scores, dtype: str, layout: str) -> None:
    gap = gap_between(found[layout, dtype], expected)
    assert gap.within(BOUNDS[dtype]), gap
    assert dtype == "fp32" or gap.mean > 10 * BOUNDS["fp32"].mean, "it did not run in bf16"


def with_rows_changed(policy: Policy, groups: list[RolloutGroup], change: Callable[[PackedRow], None]) -> Scores:
    rows = pack_for_scoring(groups, row_tokens=ROW_TOKENS)
    for row in rows:
        change(row)
    for node, values in per_node(rows, policy.log_probs(rows), groups):
        node.old_logprobs = values
    return [node.old_logprobs for group in groups for node in group.nodes]


def everything_before_is_seen(row: PackedRow) -> None:
    row.subtree_end = torch.full_like(row.subtree_end, row.num_tokens)


def positions_are_those_of_the_row(row: PackedRow) -> None:
    row.position_ids = torch.arange(row.num_tokens)


def targets_are_one_late(row: PackedRow) -> None:
    row.predictor = (row.predictor + 1).clamp(max=row.num_tokens - 1)


ROW_MISTAKES = (everything_before_is_seen, positions_are_those_of_the_row, targets_are_one_late)


def mistaken(policy: Policy, groups: list[RolloutGroup]) -> tuple[dict[str, Scores], Scores]:
    """(scores by each mistake, scores when all are taken back)."""
    wrong = {change.__name__: with_rows_changed(policy, groups, change) for change in ROW_MISTAKES}
    rope = policy.chunks[0].rotary_pos_emb
    kept = rope.inv_freq.clone()
    rope.inv_freq = (ROPE_BASE / 10) ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    wrong["another rope base"] = scores(policy, groups)
    rope.inv_freq = kept
    first, second, *_ = dict(global_names(policy.chunks))["decoder.layers.0.self_attention.linear_qkv.weight"].data.split(HEAD_DIM)
    kept = first.clone()
    first.copy_(second), second.copy_(kept)
    wrong["two heads swapped in one layer"] = scores(policy, groups)
    second.copy_(first), first.copy_(kept)
    return wrong, scores(policy, groups)


def test_wrong_answers_lie_far_beyond_the_bounds_of_both_dtypes(folder: Path, trees: list[RolloutGroup], expected: Scores) -> None:
    ((wrong, right),) = run_ranks(mistaken, make_config(folder), trees)
    assert len(wrong) == 5
    for mistake, scored in wrong.items():
        gap = gap_between(scored, expected)
        assert gap.mean > 5 * BOUNDS["bf16"].mean and gap.worst > 3 * BOUNDS["bf16"].worst, (mistake, gap)
    assert gap_between(right, expected).within(BOUNDS["fp32"])


# ---- gradients


def gradients_of_a_step(policy: Policy, groups: list[RolloutGroup]) -> Tensors:
    weight = partial(token_weight, LOSS.aggregation)
    rows = pack_for_training(groups, row_tokens=ROW_TOKENS, multiple=policy.row_multiple, token_weight=weight)
    policy.forward_backward(rows, partial(row_loss, step_counts(groups)))
    return few(gradients(policy))


def few(found: Tensors) -> Tensors:
    return {name: found[name][:FEW_ROWS].clone() for name in GRADIENTS}


@pytest.fixture(scope="module")
def slopes(folder: Path, trees: list[RolloutGroup]) -> Tensors:
    """By transformers."""
    return few(hf_step(folder, trees)[0])


@pytest.mark.parametrize("layout", ["tp3", "cp2"])
def test_gradients_are_those_of_transformers(folder: Path, trees: list[RolloutGroup], slopes: Tensors, layout: str) -> None:
    config = make_config(folder, parallel__distributed_optimizer=False, **LAYOUTS[layout])
    found = run_ranks(gradients_of_a_step, config, trees)[0]
    for name in GRADIENTS:
        assert relative_error(found[name], slopes[name]) < GRADIENT_BOUND, name


def test_gradients_of_another_layer_or_of_half_the_rows_fail_the_comparison(slopes: Tensors) -> None:
    here, beside = (slopes[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (14, 15))
    assert relative_error(beside, here) > 100 * GRADIENT_BOUND
    assert relative_error(slopes["model.norm.weight"] / 2, slopes["model.norm.weight"]) > 100 * GRADIENT_BOUND


# ---- files


def test_the_gguf_file_comes_back_bit_equal_through_megatron(folder: Path) -> None:
    # Not in pytest's folder, which outlives the tests: these are 1.1 GB.
    with tempfile.TemporaryDirectory(prefix="igpo-llm-") as temporary:
        megatron, out = Path(temporary) / "megatron", Path(temporary) / "back"
        hf_to_megatron(folder, megatron)
        megatron_to_hf(megatron, out)
        back = HfReader(out)
        tensors = {name: back.get(name).clone() for name in back.names()}
    file = read_gguf(gguf_to_hf.demo_gguf())
    assert len(tensors) == len(file.tensors)
    gguf_to_hf._compare_tensors(file, tensors, torch.float32)
    name = "model.layers.7.self_attn.k_proj.weight"
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    with pytest.raises(ConversionError, match="other values than the package gguf"):
        gguf_to_hf._compare_tensors(file, tensors, torch.float32)
