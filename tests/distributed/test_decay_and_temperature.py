"""Weight decay spares norms and biases, also after a resume; probes are scored at the temperature that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_config, run_ranks_for_each
from groups import held, load_hf, random_groups

from igpo_megatron.packing.tree import pack_for_scoring, pack_for_training, per_node
from igpo_megatron.policy import checkpoint
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RolloutGroup

LR, DECAY = 0.1, 0.5


def step_without_gradient(policy: Policy, groups: list[RolloutGroup]) -> dict[str, tuple[int, float]]:
    """Parameter -> (dimensions, what its norm was multiplied by): with a gradient of zero Adam only decays."""
    parameters = {f"{number}.{name}": p for number, chunk in enumerate(policy.chunks) for name, p in chunk.named_parameters()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)  # no bias is zero
    policy.optimizer.reload_model_params()
    before = {name: p.detach().double().norm() for name, p in parameters.items()}
    rows = pack_for_training(groups, row_tokens=60, multiple=policy.row_multiple, token_weight=lambda n: 1.0)
    policy.optimizer_step(policy.forward_backward(rows, lambda tokens: ((tokens.logprobs * 0).sum(), {})))
    return {name: (p.dim(), float(p.detach().double().norm() / before[name])) for name, p in parameters.items()}


def decay_before_and_after_a_resume(policy: Policy, folder: Path, groups: list[RolloutGroup]) -> list[dict[str, tuple[int, float]]]:
    fresh = step_without_gradient(policy, groups)
    for group in policy.optimizer.param_groups:
        group["weight_decay"] = DECAY  # as checkpoints from before norms and biases were spared have it
    name = f"{policy.shape.model_type}-{policy.config.parallel.distributed_optimizer}"
    checkpoint.save(policy, folder / name, 1, {}, keep=1)
    checkpoint.load(policy, checkpoint.complete(folder / name)[-1])
    assert all(group["weight_decay"] == DECAY for group in policy.optimizer.param_groups), "the checkpoint brings its own"
    return [fresh, step_without_gradient(policy, groups)]


def test_weight_decay_spares_norms_and_biases_also_after_a_resume(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim__lr": LR, "optim__weight_decay": DECAY, "parallel__data": 2}
    configs = [
        make_config(hf_folders["qwen2_tied"], **settings),  # biases of projections
        make_config(hf_folders["qwen3"], **settings, parallel__distributed_optimizer=False),  # norms of queries and keys
        make_config(hf_folders["qwen3_moe"], **settings),
    ]
    groups = random_groups(seed=2, probes=False)
    for ranks in run_ranks_for_each(decay_before_and_after_a_resume, configs, tmp_path, groups):
        for found in (found for rank in ranks for found in rank):
            assert {dimensions for dimensions, _ in found.values()} == {1, 2}
            for name, (dimensions, factor) in found.items():
                spared = dimensions == 1
                assert spared == ("norm" in name or name.endswith("bias")), name
                assert abs(factor - (1.0 if spared else 1 - LR * DECAY)) < 1e-6, f"{name} was multiplied by {factor}"


def scored(policy: Policy, groups: list[RolloutGroup]) -> dict[str, list[list[float]]]:
    """Scorer -> log-probs of every action and probe node, on the main rank."""
    groups = held(policy, groups)
    found = {}
    for scorer in ("fold", "batched", "sequential"):
        rows = pack_for_scoring(groups, row_tokens=60, multiple=policy.row_multiple, scorer=scorer)
        for node, values in per_node(rows, policy.log_probs(rows), groups):
            node.old_logprobs = values
        found[scorer] = [node.old_logprobs for group in groups for node in group.nodes]
    return found


def by_transformers(
    model: torch.nn.Module, groups: list[RolloutGroup], of_probes: float, of_actions: float, sampled_vocab: int | None = None
) -> list[list[float]]:
    """The same, one sequence at a time: log-softmax of logits over the temperature, of a probe its scored tokens among all."""
    result = []
    for group in groups:
        for node in group.nodes:
            if node.kind not in ("action", "probe"):
                result.append([])
                continue
            context = group.context(node.parent)
            logits = model(torch.tensor([context + node.token_ids])).logits[0].float() / (of_probes if node.kind == "probe" else of_actions)
            logits = logits if node.kind == "probe" else logits[:, :sampled_vocab]
            logprobs = torch.log_softmax(logits, -1)[len(context) - 1 : -1].gather(-1, torch.tensor(node.token_ids)[:, None])[:, 0]
            result.append(logprobs.tolist()[slice(*(node.scored or (None,)))])
    return result


def worst(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))


def test_probes_are_scored_at_their_own_temperature_by_every_scorer_and_layout(hf_folders: dict[str, Path]) -> None:
    folder, groups = hf_folders["qwen3"], random_groups(seed=4, count=3)
    with torch.no_grad():
        expected = {at: by_transformers(load_hf(folder), groups, at, 0.7) for at in (1.0, 0.7)}
    assert worst(expected[1.0], expected[0.7]) > 1e-2, "the other temperature must fail below"
    own = make_config(folder, rollout__temperature=0.7)
    assert own.reward.probe_temperature == 1
    configs = [own, make_config(folder, rollout__temperature=0.7, reward__probe_temperature="sampling")]
    plain, sampling = run_ranks_for_each(scored, configs, groups)
    spread = [make_config(folder, rollout__temperature=0.7, **{f"parallel__{kind}": 2}) for kind in ("tensor", "context", "pipeline")]
    for of_probes, ranks in ((1.0, plain), (0.7, sampling), *((1.0, ranks) for ranks in run_ranks_for_each(scored, spread, groups))):
        for scorer, values in ranks[0].items():
            assert worst(values, expected[of_probes]) < 1e-5, (scorer, of_probes)


SAMPLED = 100


def scored_among(policy: Policy, groups: list[RolloutGroup]) -> list[Any]:
    """As sampled, and the actions again at a temperature that is given."""
    policy.sampled_vocab = SAMPLED
    groups = held(policy, groups)
    found = scored(policy, groups)["fold"]
    rows = pack_for_scoring(groups, row_tokens=60, multiple=policy.row_multiple, scorer=None)
    for node, values in per_node(rows, policy.log_probs(rows, temperature=0.7), groups):
        node.old_logprobs = values
    return [found, [node.old_logprobs if node.kind == "action" else [] for group in groups for node in group.nodes]]


def test_sampled_tokens_are_scored_among_those_that_can_be_sampled_and_all_others_among_all(hf_folders: dict[str, Path]) -> None:
    folder, groups = hf_folders["qwen3"], random_groups(seed=4, count=3)
    for node in (node for group in groups for node in group.nodes if node.kind == "action"):
        node.token_ids = [token % SAMPLED for token in node.token_ids]
    with torch.no_grad():
        expected, among_all = (by_transformers(load_hf(folder), groups, 1.0, 0.7, vocab) for vocab in (SAMPLED, None))
    assert worst(expected, among_all) > 1e-2, "all rows must fail below"
    actions = [node.kind == "action" for group in groups for node in group.nodes]
    configs = [make_config(folder, rollout__temperature=0.7, **{f"parallel__{kind}": 2}) for kind in ("data", "tensor", "context")]
    for ranks in run_ranks_for_each(scored_among, configs, groups):
        as_sampled, given = ranks[0]
        assert worst(as_sampled, expected) < 1e-5
        assert worst(given, [values if action else [] for values, action in zip(among_all, actions, strict=True)]) < 1e-5
