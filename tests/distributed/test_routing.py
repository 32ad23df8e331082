"""Routing replay: given experts are taken at every layout, and giving a router its own choice changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import load_hf, random_groups
from test_layouts import MIXTURE_LAYOUTS, gradients, relative_error, row_loss, with_off_policy_logprobs

from igpo_megatron.packing.tree import PackedRow, pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy.policy import Policy
from igpo_megatron.training.step import replayed_experts, routing_metrics, score_tokens
from igpo_megatron.types import RolloutGroup

LAYERS, EXPERTS, TOP_K = 2, 4, 2
REPLAY: dict[str, Any] = {"rollout__routing_replay": True, "packing__row_tokens": 60}


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
    found, *others = run_ranks(score, make_config(hf_folders["qwen3_moe"], **settings), groups, 5)
    assert gap(found, alone) < 1e-5 and not any(others)
    (free,) = run_ranks(score, make_config(hf_folders["qwen3_moe"]), groups, None)
    (other,) = run_ranks(score, make_config(hf_folders["qwen3_moe"]), groups, 6)
    assert gap(free, alone) > 0.05 and gap(other, alone) > 0.05


def record(groups: list[RolloutGroup], seed: int, layers: int = LAYERS, missing: float = 0.0) -> list[RolloutGroup]:
    """Give every token but the probes' experts drawn by `seed`; a share of them stays without."""
    generator = torch.Generator().manual_seed(seed)
    for node in (node for group in groups for node in group.nodes if node.kind != "probe"):
        chosen = torch.rand(len(node.token_ids), layers, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].flatten(1)
        lost = torch.rand(len(node.token_ids), generator=generator) < missing
        node.experts = [None if gone else bytes(row) for row, gone in zip(chosen.tolist(), lost.tolist(), strict=True)]
    return groups


def hf_logprobs_by(folder: Path, group: RolloutGroup) -> list[list[float]]:
    """Log-probs of all action nodes by transformers, its routers made to take the recorded experts where there are some."""
    model, found = load_hf(folder), {}
    for trajectory in group.trajectories:
        nodes = [group.nodes[index] for index in trajectory.path]
        recorded = [experts for node in nodes for experts in node.experts]
        for layer, block in enumerate(model.model.layers):
            given_here = {
                token: torch.tensor(list(experts)).view(LAYERS, TOP_K)[layer]
                for token, experts in enumerate(recorded)
                if experts is not None
            }

            def route(module: Any, given: Any, output: Any, fixed: dict[int, torch.Tensor] = given_here) -> Any:
                logits, _, chosen = output
                for token, experts in fixed.items():
                    chosen[token] = experts
                weights = torch.softmax(given[0].reshape(-1, 64) @ module.weight.T, -1).gather(-1, chosen)
                return logits, weights / weights.sum(-1, keepdim=True), chosen

            block.mlp.gate.register_forward_hook(route)
        ids = [token for node in nodes for token in node.token_ids]
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        position = 0
        for index, node in zip(trajectory.path, nodes, strict=True):
            if node.kind == "action":
                found[index] = logprobs[position - 1 : position - 1 + len(node.token_ids)].tolist()
            position += len(node.token_ids)
        model = load_hf(folder)
    return [found[index] for index in sorted(found)]


def scored(policy: Policy, groups: list[RolloutGroup]) -> tuple[list[list[float]], dict[str, float], dict[str, float]]:
    """Old log-probs of the actions as a step fills them; metrics of a step that measures the gap without replay, and of the next."""
    score_tokens(policy, groups)
    found = [list(node.old_logprobs) for group in groups for node in group.nodes if node.kind == "action"]
    metrics = [routing_metrics(policy, groups, step) for step in (1, 2)]
    assert found == [node.old_logprobs for group in groups for node in group.nodes if node.kind == "action"]
    return found, *metrics


def test_scores_with_recorded_experts_are_those_of_transformers_given_the_same(hf_folders: dict[str, Path]) -> None:
    folder = hf_folders["qwen3_moe"]
    (group,) = record(random_groups(seed=1, count=1, probes=False), seed=5, missing=0.3)
    for node in group.nodes:
        node.behavior_logprobs = [-1.0] * len(node.token_ids) if node.kind == "action" else []
    expected = hf_logprobs_by(folder, group)
    ((found, measured, later),) = run_ranks(scored, make_config(folder, **REPLAY), [group])
    ((free, none, _),) = run_ranks(scored, make_config(folder), [group])
    assert max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)) < 1e-4
    assert max(abs(a - b) for x, y in zip(free, expected, strict=True) for a, b in zip(x, y, strict=True)) > 0.05
    assert none == {} and 0.6 < measured["routed_tokens"] < 0.8 and later == {"routed_tokens": measured["routed_tokens"]}
    # What the engine said is made up: the second measurement must be that of free routers.
    assert measured["logprob_gap_max_free"] == pytest.approx(max(abs(-1.0 - own) for node in free for own in node), abs=1e-5)


def replayed_gradients(policy: Policy, groups: list[RolloutGroup]) -> dict[str, torch.Tensor]:
    """Of one training pass with the recorded experts, under HF names: this rank's stage and experts."""
    rows = pack_for_training(
        groups, row_tokens=60, multiple=policy.row_multiple, token_weight=lambda tokens: 1.0, experts=replayed_experts(policy)
    )
    assert len(rows) > 2, "a pipeline must have gone on to other rows before the first goes backward"
    policy.forward_backward(rows, partial(row_loss, step_counts(groups)))
    return gradients(policy)


@pytest.mark.parametrize(
    "layout",
    [
        {"model__recompute": "full"},
        {"parallel__pipeline": 2, "model__recompute": "full"},
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3, "model__recompute": "full"},
        {"parallel__pipeline": 2, "parallel__data": 2, "parallel__expert": 2, "model__recompute": "full"},
    ],
    ids=["one_rank", "pp2", "vp3", "ep2_pp2"],
)
def test_layers_that_are_computed_again_take_the_experts_of_their_own_row(deep_folders: dict[str, Path], layout: dict[str, Any]) -> None:
    groups = record(with_off_policy_logprobs(random_groups(seed=2, count=4, probes=False)), seed=7, layers=6, missing=0.2)
    plain = {**REPLAY, "parallel__distributed_optimizer": False}
    (expected,) = run_ranks(replayed_gradients, make_config(deep_folders["qwen3_moe"], **plain), groups)
    results = run_ranks(replayed_gradients, make_config(deep_folders["qwen3_moe"], **plain, **layout), groups)
    found = {key: tensor for part in results for key, tensor in part.items()}
    assert set(found) == set(expected)
    for key, tensor in found.items():
        assert relative_error(tensor, expected[key]) < 2e-5, key


def test_gradients_with_other_experts_fail_that_comparison(deep_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, count=4, probes=False))
    config = make_config(deep_folders["qwen3_moe"], **REPLAY, parallel__distributed_optimizer=False)
    (left,), (right,) = (run_ranks(replayed_gradients, config, record(groups, seed=seed, layers=6)) for seed in (7, 8))
    assert max(relative_error(left[key], right[key]) for key in left) > 0.1
