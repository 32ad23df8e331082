"""Routing replay: given experts are taken at every layout, and giving a router its own choice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from test_layouts import MIXTURE_LAYOUTS

from igpo_megatron.actor.policy import Policy
from igpo_megatron.packing.tree import PackedRow, pack_for_scoring
from igpo_megatron.types import RolloutGroup

LAYERS, EXPERTS, TOP_K = 2, 4, 2


def rows_of(policy: Policy, groups: list[RolloutGroup]) -> list[PackedRow]:
    return pack_for_scoring(groups, row_tokens=60, multiple=4)


def score(policy: Policy, groups: list[RolloutGroup], seed: int | None) -> list[torch.Tensor]:
    """Log-probs with experts drawn by `seed`; None leaves them to the routers."""
    rows = rows_of(policy, groups)
    for number, row in enumerate(rows if seed is not None else []):
        generator = torch.Generator().manual_seed(seed + number)
        row.experts = torch.rand(row.num_tokens, LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    return policy.log_probs(rows)


def gap(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def score_with_own_choice(policy: Policy, groups: list[RolloutGroup]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(without replay, with the experts that the routers chose themselves replayed)."""
    (row,) = rows_of(policy, groups)
    routers = [layer.mlp.router for layer in policy.chunks[0].decoder.layers]
    chosen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, given, output: chosen.append(output[0].detach().topk(TOP_K).indices))
        for router in routers
    ]
    plain = policy.log_probs([row])
    for hook in hooks:
        hook.remove()
    row.experts = torch.stack(chosen, dim=1)
    return plain, policy.log_probs([row])


def test_a_routers_own_choice_replayed_changes_nothing(hf_folders: dict[str, Path]) -> None:
    ((plain, replayed),) = run_ranks(score_with_own_choice, make_config(hf_folders["qwen3_moe"]), random_groups(seed=1, count=1))
    assert gap(plain, replayed) < 1e-5


@pytest.mark.parametrize("layout", ["pp2", "tp2", "cp2_ep2"])
def test_given_experts_are_taken_at_every_layout(hf_folders: dict[str, Path], layout: str) -> None:
    groups = random_groups(seed=1)
    settings: dict[str, Any] = MIXTURE_LAYOUTS[layout]
    (alone,) = run_ranks(score, make_config(hf_folders["qwen3_moe"]), groups, 5)
    for found in run_ranks(score, make_config(hf_folders["qwen3_moe"], **settings), groups, 5):
        assert gap(found, alone) < 1e-5
    (free,) = run_ranks(score, make_config(hf_folders["qwen3_moe"]), groups, None)
    (other,) = run_ranks(score, make_config(hf_folders["qwen3_moe"]), groups, 6)
    assert gap(free, alone) > 0.05 and gap(other, alone) > 0.05
