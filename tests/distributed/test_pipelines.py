"""Uneven and virtual pipelines: scores, loss, gradients and updated weights of one rank, and checkpoints that load at any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from test_checkpoint import SMALL, load_and_train, train_and_save
from test_layouts import one_step, reference_logprobs, relative_error, scored_nodes, with_off_policy_logprobs, worst

from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

PIPELINES: dict[str, dict[str, Any]] = {
    "first4": {"parallel__pipeline": 2, "parallel__first_stage_layers": 4},
    "last5": {"parallel__pipeline": 2, "parallel__last_stage_layers": 5},
    "pp3_first1_last3": {"parallel__pipeline": 3, "parallel__first_stage_layers": 1, "parallel__last_stage_layers": 3},
    "vp3": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3},
    "vp2_first4": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__first_stage_layers": 4},
    "vp3_tp2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3, "parallel__tensor": 2, "parallel__sequence": True},
}
MIXTURE_PIPELINES: dict[str, dict[str, Any]] = {
    "vp3_ep2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3, "parallel__data": 2, "parallel__expert": 2},
    "last5": PIPELINES["last5"],
}
PLAIN = {"parallel__distributed_optimizer": False}


def layers_held(policy: Policy, groups: list[RolloutGroup]) -> list[list[int]]:
    return [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in policy.chunks]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("pp3_first1_last3", [[[0]], [[1, 2]], [[3, 4, 5]]]),
        ("vp3", [[[0], [2], [4]], [[1], [3], [5]]]),
        ("vp2_first4", [[[0, 1], [3, 4]], [[2], [5]]]),
    ],
)
def test_stages_hold_the_layers_they_were_given(deep_folders: dict[str, Path], layout: str, expected: list[list[list[int]]]) -> None:
    assert run_ranks(layers_held, make_config(deep_folders["qwen2_tied"], **PIPELINES[layout]), []) == expected


@pytest.mark.parametrize(
    ("architecture", "layout"), [*(("qwen2_tied", name) for name in PIPELINES), *(("qwen3_moe", name) for name in MIXTURE_PIPELINES)]
)
def test_a_step_is_that_of_one_rank(deep_folders: dict[str, Path], one_rank: dict[str, Any], architecture: str, layout: str) -> None:
    settings = (MIXTURE_PIPELINES if architecture == "qwen3_moe" else PIPELINES)[layout]
    gradients, loss, norm, weights = one_rank[architecture]
    results = run_ranks(one_step, make_config(deep_folders[architecture], **settings, **PLAIN), off_policy_groups())
    found = {key: tensor for grads, *_ in results for key, tensor in grads.items()}
    assert results[0][1] == pytest.approx(loss, abs=1e-5)
    assert results[0][2] == pytest.approx(norm, rel=1e-5)
    assert set(found) == set(gradients)
    for key, tensor in found.items():
        assert relative_error(tensor, gradients[key]) < 2e-5, key
    assert set(results[0][3]) == set(weights)
    for key, tensor in results[0][3].items():
        # Adam divides by the gradient's own size, so where a gradient is almost zero its rounding decides the sign.
        settled = gradients[key].abs() > 1e-5
        assert float((tensor - weights[key])[settled].abs().max() if settled.any() else 0.0) < 2e-4, key


def test_layers_in_another_order_fail_the_comparison(one_rank: dict[str, Any]) -> None:
    gradients, _, _, weights = one_rank["qwen2_tied"]
    first, second = (f"model.layers.{number}.mlp.down_proj.weight" for number in (1, 2))
    assert relative_error(gradients[first], gradients[second]) > 1e-2
    assert float((weights[first] - weights[second]).abs().max()) > 1e-2


@pytest.mark.parametrize("layout", ["vp2_first4"])
def test_scores_are_those_of_transformers(deep_folders: dict[str, Path], layout: str) -> None:
    groups = random_groups(seed=1, probes=False)
    expected = reference_logprobs(deep_folders["qwen2_tied"], groups)
    scores, *others = run_ranks(scored_nodes, make_config(deep_folders["qwen2_tied"], **PIPELINES[layout]), groups)
    assert worst(scores, expected) < 1e-4 and not any(others)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [("vp3", "last5"), ("first4", "vp2_first4")])
def test_checkpoints_move_between_pipelines(deep_folders: dict[str, Path], tmp_path: Path, saved_at: str, loaded_at: str | None) -> None:
    groups = off_policy_groups()
    folder = deep_folders["qwen2_tied"]
    uninterrupted, _ = run_ranks(train_and_save, make_config(folder, **PIPELINES[saved_at], **SMALL), tmp_path, groups)[0]
    assert uninterrupted[1][0] != pytest.approx(uninterrupted[0][0], abs=1e-4), "the second loss must show a wrong optimizer state"
    layout = PIPELINES[loaded_at] if loaded_at else {}
    *_, resumed = run_ranks(load_and_train, make_config(folder, **layout, **SMALL), tmp_path, groups)[0]
    for found, expected in zip(resumed, uninterrupted, strict=True):
        assert found == pytest.approx(expected, rel=2e-5)


def off_policy_groups() -> list[RolloutGroup]:
    return with_off_policy_logprobs(random_groups(seed=2, probes=False))


@pytest.fixture(scope="module")
def one_rank(deep_folders: dict[str, Path]) -> dict[str, tuple[dict[str, torch.Tensor], float, float, dict[str, torch.Tensor]]]:
    """(gradients, loss, gradient norm, weights after the step) of a single rank."""
    return {name: run_ranks(one_step, make_config(folder, **PLAIN), off_policy_groups())[0] for name, folder in deep_folders.items()}
