"""One model, many layouts: log-probs, losses, gradients and updates must be those of transformers, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import MIXTURES, make_config, run_ranks
from groups import branched_groups, flattened, held, hf_logprobs, load_hf, random_groups
from megatron.core import parallel_state

from checkpoint_conversion.architectures import rules_for
from igpo_megatron.algorithms.advantages.tree import entropy_stats
from igpo_megatron.algorithms.losses.entropy import Aepo, Hapo
from igpo_megatron.algorithms.losses.registry import LossResult, Ppo, objective, token_weight
from igpo_megatron.algorithms.losses.tokens import Tokens
from igpo_megatron.packing.tree import ProbeScorer, pack_for_scoring, pack_for_training, per_node, step_counts
from igpo_megatron.policy.model import global_names, tensor_shards
from igpo_megatron.policy.policy import Policy
from igpo_megatron.policy.weight_sync import named_weights
from igpo_megatron.types import Node, RolloutGroup, StepCounts

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"parallel__tensor": 2},
    "pp2": {"parallel__pipeline": 2},
    "tp2_pp2": {"parallel__tensor": 2, "parallel__pipeline": 2},
    "cp2": {"parallel__context": 2},
}
TRAINING_LAYOUTS: dict[str, dict[str, Any]] = {
    **LAYOUTS,
    "dp2": {"parallel__data": 2},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "tp2_dp2_sp": {"parallel__tensor": 2, "parallel__data": 2, "parallel__sequence": True},
    "tp2_pp2_sp": {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True},
    "pp2_recompute": {"parallel__pipeline": 2, "model__recompute": "full"},
    "cp2_dp2": {"parallel__context": 2, "parallel__data": 2},
    "cp2_tp2_sp": {"parallel__context": 2, "parallel__tensor": 2, "parallel__sequence": True},
    "cp2_pp2_recompute": {"parallel__context": 2, "parallel__pipeline": 2, "model__recompute": "selective"},
}
MIXTURE_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    "pp2": {"parallel__pipeline": 2},
    "tp2_pp2": {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True, "parallel__expert": 2},
    "ep2": {"parallel__data": 2, "parallel__expert": 2},
    "cp2_ep2": {"parallel__context": 2, "parallel__expert": 2},
}
MIXTURE_TRAINING_LAYOUTS: dict[str, dict[str, Any]] = {
    **MIXTURE_LAYOUTS,
    "dp2": {"parallel__data": 2},
    "ep2_pp2_recompute": {"parallel__data": 2, "parallel__expert": 2, "parallel__pipeline": 2, "model__recompute": "full"},
}
LOSS = Ppo(kl_coef=0.01, entropy_coef=0.003, aggregation="sequence_mean")
ROW_TOKENS = 60
BF16_BOUND = 0.15
"""Log-probs of these models by bf16 matmuls, against fp32."""


def scored_nodes(
    policy: Policy, groups: list[RolloutGroup], scorer: ProbeScorer = "fold", row_tokens: int = ROW_TOKENS
) -> list[list[float]]:
    """Log-probs of every action and probe node, on the main rank."""
    groups = held(policy, groups)
    rows = pack_for_scoring(groups, row_tokens=row_tokens, multiple=policy.row_multiple, scorer=scorer)
    for node, values in per_node(rows, policy.log_probs(rows), groups):
        node.old_logprobs = values
    return [node.old_logprobs for group in groups for node in group.nodes]


@torch.no_grad()
def reference_logprobs(folder: Path, groups: list[RolloutGroup]) -> list[list[float]]:
    """The same by transformers, one sequence at a time: every token of an action, the scored ones of a probe."""
    model = load_hf(folder)

    def of(group: RolloutGroup, node: Node) -> list[float]:
        if node.kind not in ("action", "probe"):
            return []
        return hf_logprobs(model, group.context(node.parent), node.token_ids).tolist()[slice(*(node.scored or (None,)))]

    return [of(group, node) for group in groups for node in group.nodes]


def worst(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def row_loss(counts: StepCounts, tokens: Tokens) -> LossResult:
    return objective(tokens, counts, LOSS)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Gradients under HF names, gathered over tensor-parallel ranks; only this pipeline stage's and this rank's experts'."""
    rules = rules_for(policy.shape, policy.config.model.vocab_multiple)
    found = {}
    for name, parameter in global_names(policy.chunks):
        rule = rules[name]
        shards = [parameter.main_grad.clone()]
        if tensor_shards(rule) > 1:
            shards = [torch.empty_like(parameter.main_grad) for _ in range(policy.ranks.tensor_size)]
            dist.all_gather(shards, parameter.main_grad.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        found |= dict(zip(rule.exports, rule.to_hf(rule.unshard(shards)), strict=bool(rule.exports)))
    return found


def one_step(policy: Policy, groups: list[RolloutGroup]) -> tuple[dict[str, torch.Tensor], float, float, dict[str, torch.Tensor]]:
    """(gradients, loss, gradient norm, weights after the update)."""
    rows = pack_for_training(
        groups, row_tokens=ROW_TOKENS, multiple=policy.row_multiple, token_weight=partial(token_weight, LOSS.aggregation)
    )
    loss = partial(row_loss, step_counts(groups))
    grads: dict[str, torch.Tensor] = {}
    if not policy.config.parallel.distributed_optimizer:
        policy.forward_backward(rows, loss)
        grads = gradients(policy)
    result = policy.optimizer_step(policy.forward_backward(rows, loss))
    return grads, result.loss, result.grad_norm, {name: tensor.clone() for name, tensor in named_weights(policy)}


def with_off_policy_logprobs(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Old and reference log-probs away from the current ones, so that ratios clip and the KL term pulls."""
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        for node in group.nodes:
            if node.kind == "action":
                node.old_logprobs = (-4.5 + torch.randn(len(node.token_ids), generator=generator)).tolist()
                node.ref_logprobs = (-4.5 + 0.5 * torch.randn(len(node.token_ids), generator=generator)).tolist()
    return groups


def hf_step(folder: Path, groups: list[RolloutGroup]) -> tuple[dict[str, torch.Tensor], float]:
    """Loss and gradients by autograd through transformers, trajectory by trajectory, no packing, no sharing."""
    model = load_hf(folder)
    counts = step_counts(groups)
    total = torch.zeros(())
    for group in groups:
        for trajectory in group.trajectories:
            actions = group.actions(trajectory)
            weight = token_weight(LOSS.aggregation, sum(len(node.token_ids) for node in actions))
            ids = [token for index in trajectory.path for token in group.nodes[index].token_ids]
            logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            position = 0
            advantages = iter(trajectory.turn_advantages)
            for index in trajectory.path:
                node = group.nodes[index]
                if node.kind == "action":
                    rows = logits[position - 1 : position - 1 + len(node.token_ids)]
                    n, advantage = len(node.token_ids), next(advantages)
                    part, _ = objective(
                        Tokens(
                            logprobs=rows.gather(-1, torch.tensor(node.token_ids)[:, None])[:, 0],
                            entropy=-(rows.exp() * rows).sum(-1),
                            old_logprobs=torch.tensor(node.old_logprobs),
                            ref_logprobs=torch.tensor(node.ref_logprobs),
                            advantages=torch.tensor([[max(weight * advantage, 0.0), max(-weight * advantage, 0.0)]] * n),
                            weight=torch.full((n,), weight),
                        ),
                        counts,
                        LOSS,
                    )
                    total = total + part
                position += len(node.token_ids)
    total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {key: tensor for name, grad in grads.items() for key, tensor in as_saved(name, grad)}, float(total.detach())


def as_saved(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """In memory transformers keeps a layer's experts in two tensors; a folder has them one by one."""
    if name.endswith("experts.gate_up_proj"):
        for expert, both in enumerate(tensor):
            for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                yield name.replace("gate_up_proj", f"{expert}.{part}.weight"), half
    elif name.endswith("experts.down_proj"):
        for expert, matrix in enumerate(tensor):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), matrix
    else:
        yield name, tensor


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("architecture", ["qwen2_tied", "qwen3", "qwen3_moe"])
def test_loss_gradients_and_update_do_not_depend_on_the_layout(hf_folders: dict[str, Path], architecture: str) -> None:
    folder = hf_folders[architecture]
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    expected, expected_loss = hf_step(folder, groups)
    updated: dict[str, torch.Tensor] = {}
    norm = 0.0
    for name, layout in (MIXTURE_TRAINING_LAYOUTS if architecture in MIXTURES else TRAINING_LAYOUTS).items():
        plain = {"parallel__distributed_optimizer": False}
        results = run_ranks(one_step, make_config(folder, **layout, **plain), groups)
        found = {key: tensor for grads, *_ in results for key, tensor in grads.items()}
        assert results[0][1] == pytest.approx(expected_loss, abs=1e-5), name
        for key, tensor in found.items():
            assert relative_error(tensor, expected[key]) < 2e-5, f"{name}: {key}"
        assert set(found) >= set(expected) - {"lm_head.weight"}, name
        weights = results[0][3]
        updated, norm = updated or weights, norm or results[0][2]
        assert results[0][2] == pytest.approx(norm, rel=1e-5), name
        for key, tensor in weights.items():
            # Adam divides by the gradient's own size, so where a gradient is almost zero its rounding decides the sign.
            settled = expected[key].abs() > 1e-5 if key in expected else torch.ones_like(tensor, dtype=torch.bool)
            assert float((tensor - updated[key])[settled].abs().max() if settled.any() else 0.0) < 2e-4, f"{name}: {key}"


@pytest.mark.parametrize("shared_by", ["data", "context"])
def test_the_distributed_optimizer_updates_as_the_plain_one_does(hf_folders: dict[str, Path], shared_by: str) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    folder = hf_folders["qwen3"]
    plain = run_ranks(one_step, make_config(folder, parallel__distributed_optimizer=False), groups)[0]
    sharded = run_ranks(one_step, make_config(folder, **{f"parallel__{shared_by}": 2}), groups)[0]
    assert sharded[2] == pytest.approx(plain[2], rel=1e-5)
    gradients_of, _, _, weights = plain
    for key, tensor in weights.items():
        settled = gradients_of[key].abs() > 1e-5
        assert float((tensor - sharded[3][key])[settled].abs().max() if settled.any() else 0.0) < 2e-4, key


def test_folded_and_batched_probes_score_as_sequential_ones_do_at_every_layout(hf_folders: dict[str, Path]) -> None:
    groups = random_groups(seed=4, count=4, turns=(1, 4))
    (sequential,) = run_ranks(partial(scored_nodes, scorer="sequential"), make_config(hf_folders["qwen3"]), groups)
    for name, layout in LAYOUTS.items():
        for recompute in ("none", "full"):
            config = make_config(hf_folders["qwen3"], model__recompute=recompute, **layout)
            assert worst(run_ranks(scored_nodes, config, groups)[0], sequential) < 1e-5, f"fold, {name}, recompute {recompute}"
    config = make_config(hf_folders["qwen3"], **LAYOUTS["tp2_pp2"])
    for scorer in ("sequential", "batched"):
        assert worst(run_ranks(partial(scored_nodes, scorer=scorer), config, groups)[0], sequential) < 1e-5, scorer


def misplaced(policy: Policy, groups: list[RolloutGroup]) -> list[list[float]]:
    """Score with sequential instead of tree positions: the published code's position fault."""
    rows = pack_for_scoring(groups, row_tokens=ROW_TOKENS, multiple=1)
    for row in rows:
        row.position_ids = torch.arange(row.num_tokens)
    for node, values in per_node(rows, policy.log_probs(rows), groups):
        node.old_logprobs = values
    return [node.old_logprobs for group in groups for node in group.nodes]


def test_wrong_probe_positions_fail_the_comparison(hf_folders: dict[str, Path]) -> None:
    groups = random_groups(seed=4, count=4, turns=(1, 4))
    config = make_config(hf_folders["qwen3"])
    (wrong,) = run_ranks(misplaced, config, groups)
    (sequential,) = run_ranks(partial(scored_nodes, scorer="sequential"), config, groups)
    assert worst(wrong, sequential) > 1e-3


def exported(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(policy)}


def without_finite_loss(policy: Policy, groups: list[RolloutGroup]) -> tuple[bool, int, bool]:
    """(skipped, steps counted, weights unchanged) of a step whose loss is not a number."""
    before = exported(policy)
    rows = pack_for_training(groups, row_tokens=ROW_TOKENS, token_weight=lambda n: 1.0)
    sums = policy.forward_backward(rows, lambda tokens: ((tokens.logprobs * float("nan")).sum(), {"tokens": torch.tensor(1.0)}))
    result = policy.optimizer_step(sums)
    after = exported(policy)
    return result.skipped, policy.steps_taken, all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_with_a_non_finite_loss_is_skipped_and_counted(hf_folders: dict[str, Path]) -> None:
    (found,) = run_ranks(without_finite_loss, make_config(hf_folders["qwen3"]), random_groups(seed=5, probes=False))
    assert found == (True, 1, True)


def test_bf16_scores_and_trains_close_to_fp32(hf_folders: dict[str, Path]) -> None:
    folder = hf_folders["qwen3"]
    groups = random_groups(seed=1)
    expected = reference_logprobs(folder, groups)
    for layout in ({}, LAYOUTS["tp2_pp2"]):
        found = run_ranks(scored_nodes, make_config(folder, model__dtype="bf16", **layout), groups)[0]
        assert 1e-4 < worst(found, expected) < BF16_BOUND  # the lower bound: it did not run in fp32
    (wrong,) = run_ranks(scored_nodes, make_config(hf_folders["qwen2"], model__dtype="bf16"), groups)
    assert worst(wrong, expected) > 4 * BF16_BOUND

    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    exact, loss = hf_step(folder, groups)
    for layout in ({}, {"parallel__tensor": 2}, {"parallel__context": 2}, {"parallel__data": 2}, {"parallel__pipeline": 2}):
        results = run_ranks(one_step, make_config(folder, model__dtype="bf16", parallel__distributed_optimizer=False, **layout), groups)
        assert results[0][1] == pytest.approx(loss, rel=0.05)
        for key, gradient in [row for found, *_ in results for row in found.items()]:
            assert torch.cosine_similarity(gradient.float().flatten(), exact[key].flatten(), dim=0) > 0.99, key


def two_bf16_steps(policy: Policy, groups: list[RolloutGroup]) -> tuple[bool, torch.dtype]:
    """(weights moved, their dtype) after two steps of the distributed optimizer, whose master weights are fp32."""
    before = exported(policy)
    rows = pack_for_training(groups, row_tokens=ROW_TOKENS, token_weight=partial(token_weight, LOSS.aggregation))
    for _ in range(2):
        assert not policy.optimizer_step(policy.forward_backward(rows, partial(row_loss, step_counts(groups)))).skipped
    after = exported(policy)
    return all(not torch.equal(before[name], after[name]) for name in before), after["lm_head.weight"].dtype


def test_bf16_trains_with_the_distributed_optimizer(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    for found in run_ranks(two_bf16_steps, make_config(hf_folders["qwen3"], model__dtype="bf16", parallel__data=2), groups):
        assert found == (True, torch.bfloat16)


def branched_step(policy: Policy, groups: list[RolloutGroup], loss: Ppo) -> tuple[dict[str, torch.Tensor], int]:
    """(gradients, tokens computed) of one step by `loss`, as the trainer calls it."""
    rows = pack_for_training(
        groups, row_tokens=ROW_TOKENS, multiple=policy.row_multiple, token_weight=partial(token_weight, loss.aggregation)
    )
    stats = entropy_stats(groups, 0.3) if loss.uses_old_entropies else None
    counts = replace(step_counts(groups), entropy=stats)
    policy.forward_backward(rows, partial(objective, counts=counts, config=loss))
    return gradients(policy), sum(row.num_tokens for row in rows)


@pytest.mark.parametrize(
    "loss",
    [LOSS, Aepo(kl_coef=0.01, balanced_tokens="high_entropy", aggregation="token_mean"), Hapo(kl_coef=0.01)],
    ids=lambda loss: loss.name,
)
def test_branched_groups_train_as_their_trajectories_do_one_by_one(hf_folders: dict[str, Path], loss: Ppo) -> None:
    """Shared turns are computed once, at every layout, with the gradient of flat training."""
    groups = with_off_policy_logprobs(branched_groups(seed=7))
    generator = torch.Generator().manual_seed(4)
    for group in groups:
        for node in group.nodes:
            node.old_entropies = torch.rand(len(node.token_ids), generator=generator).tolist() if node.kind == "action" else []
    folder, plain = hf_folders["qwen3"], {"parallel__distributed_optimizer": False}
    ((expected, flat_tokens),) = run_ranks(branched_step, make_config(folder, **plain), flattened(groups), loss)
    for name, layout in LAYOUTS.items():
        results = run_ranks(branched_step, make_config(folder, **layout, **plain), groups, loss)
        for key, tensor in ((key, tensor) for found, _ in results for key, tensor in found.items()):
            assert relative_error(tensor, expected[key]) < 1e-5, f"{name}: {key}"
        assert results[0][1] < flat_tokens


def test_entropies_before_the_step_are_those_of_the_model(hf_folders: dict[str, Path]) -> None:
    groups = branched_groups(seed=8, count=1)
    model = load_hf(hf_folders["qwen3"])
    for layout in (LAYOUTS["tp2"], LAYOUTS["pp2"]):
        scored = run_ranks(entropies_of, make_config(hf_folders["qwen3"], **layout), groups)[0]
        for node, found in zip(groups[0].nodes, scored, strict=True):
            if node.kind == "action":
                ids = groups[0].context(node.parent or 0) + node.token_ids
                logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[-len(node.token_ids) - 1 : -1]
                assert found == pytest.approx((-(logits.exp() * logits).sum(-1)).tolist(), abs=1e-5)


def entropies_of(policy: Policy, groups: list[RolloutGroup]) -> list[list[float]]:
    groups = held(policy, groups)
    rows = pack_for_scoring(groups, row_tokens=ROW_TOKENS)
    for node, values in per_node(rows, [pair[:, 1] for pair in policy.log_probs(rows, with_entropy=True)], groups):
        node.old_entropies = values
    return [node.old_entropies for group in groups for node in group.nodes]
