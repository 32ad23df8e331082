"""The parity table: every family that `architectures.ARCHITECTURES` lists, against transformers at every layout, and back bit-equal.

The ranks of a layout are started once and take the families one after the other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, MIXTURES, make_config, run_ranks_for_each
from groups import random_groups
from test_layouts import LAYOUTS, MIXTURE_LAYOUTS, exported, reference_logprobs, scored_nodes, worst

from checkpoint_conversion.architectures import ARCHITECTURES as TABLES
from checkpoint_conversion.architectures import read_shape
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

TOLERANCE = 1e-4
"""Largest difference of a log-prob in fp32."""

DENSE = tuple(name for name in ARCHITECTURES if name not in MIXTURES)
GROUPS_SEED = 1

Found = dict[tuple[str, str], tuple[list[list[float]], dict[str, torch.Tensor]]]
"""(family, layout) -> (scores, weights exported), both by the main rank."""


def score_and_export(policy: Policy, groups: list[RolloutGroup]) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    scores = scored_nodes(policy, groups)
    weights = exported(policy)
    return scores, weights if policy.ranks.is_main else {}


@pytest.fixture(scope="module")
def found(hf_folders: dict[str, Path]) -> Found:
    results: Found = {}
    for families, layouts in ((DENSE, LAYOUTS), (MIXTURES, MIXTURE_LAYOUTS)):
        for layout, settings in layouts.items():
            configs = [make_config(hf_folders[family], **settings) for family in families]
            of_each = run_ranks_for_each(score_and_export, configs, random_groups(GROUPS_SEED))
            for family, ranks in zip(families, of_each, strict=True):
                results[family, layout] = ranks[0]
    return results


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_log_probs_equal_those_of_transformers_at_every_layout(found: Found, hf_folders: dict[str, Path], family: str) -> None:
    expected = reference_logprobs(hf_folders[family], random_groups(GROUPS_SEED))
    for (name, layout), (scores, _) in found.items():
        if name == family:
            assert worst(scores, expected) < TOLERANCE, layout


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_weights_come_back_bit_equal_from_every_layout(found: Found, hf_folders: dict[str, Path], family: str) -> None:
    original = HfReader(hf_folders[family])
    for (name, layout), (_, weights) in found.items():
        if name == family:
            assert sorted(weights) == original.names(), layout
            for key, tensor in weights.items():
                assert torch.equal(tensor, original.get(key)), f"{layout}: {key}"


def test_every_supported_architecture_has_its_row(hf_folders: dict[str, Path]) -> None:
    assert {read_shape(hf_folders[family]).model_type for family in ARCHITECTURES} == set(TABLES)


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope scaling forgotten": ("llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "another rope base": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    "experts' weights not scaled": ("qwen3_moe", {"norm_topk_prob": False}),
    "experts' weights scaled": ("qwen3_moe_unscaled", {"norm_topk_prob": True}),
    "another number of experts per token": ("mixtral", {"num_experts_per_tok": 3}),
    "another norm epsilon": ("qwen3", {"rms_norm_eps": 1e-3}),
}


def score(policy: Policy, groups: list[RolloutGroup]) -> list[list[float]]:
    return scored_nodes(policy, groups)


def test_every_kind_of_mistake_fails_the_tolerance(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    groups = random_groups(GROUPS_SEED)
    configs = []
    for mistake, (family, change) in MISTAKES.items():
        folder = tmp_path / mistake
        shutil.copytree(hf_folders[family], folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **change}))
        configs.append(make_config(folder))
    for (mistake, (family, _)), (scores,) in zip(MISTAKES.items(), run_ranks_for_each(score, configs, groups), strict=True):
        assert worst(scores, reference_logprobs(hf_folders[family], groups)) > 5 * TOLERANCE, mistake
