"""Small random rollout groups, and what transformers says of them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from conftest import VOCAB

from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory


def random_groups(seed: int, count: int = 3, *, probes: bool = True, turns: tuple[int, int] = (1, 3)) -> list[RolloutGroup]:
    """Ragged groups: samples share the prompt, turn counts and lengths differ, a probe hangs before every action."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    groups = []
    for number in range(count):
        group = RolloutGroup(Prompt(str(number), "?", ("a",), "test"), [Node(None, "prompt", tokens(3, 9))])
        probe = tokens(2, 6)
        for sample in range(rng.randint(1, 3)):
            path = [0]
            for turn in range(1, rng.randint(*turns) + 1):
                if probes and (turn > 1 or sample == 0):
                    group.add(Node(path[-1], "probe", probe, turn - 1, scored=(1, len(probe))))
                path.append(group.add(Node(path[-1], "action", tokens(2, 7), turn)))
                path.append(group.add(Node(path[-1], "observation", tokens(2, 12), turn)))
            path.pop()  # the last turn answers: nothing follows it
            advantages = [rng.gauss(0, 1) for index in path if group.nodes[index].kind == "action"]
            group.trajectories.append(Trajectory(path, Status.FINISHED, turn_advantages=advantages))
        groups.append(group)
    return groups


def branched_groups(seed: int, count: int = 2) -> list[RolloutGroup]:
    """Groups whose trajectories fork off one another behind results, as a branching rollout leaves them; advantages of both signs."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    groups = []
    for number in range(count):
        group = RolloutGroup(Prompt(str(number), "?", ("a",), "test"), [Node(None, "prompt", tokens(3, 9))])
        for _ in range(5):
            earlier = rng.choice(group.trajectories).path if group.trajectories and rng.random() < 0.8 else [0]
            results = [place for place, index in enumerate(earlier) if group.nodes[index].kind == "observation"]
            path = earlier[: rng.choice(results) + 1] if results else [0]
            for turn in range(group.nodes[path[-1]].turn + 1, 4):
                path = [*path, group.add(Node(path[-1], "action", tokens(2, 7), turn))]
                path = [*path, group.add(Node(path[-1], "observation", tokens(2, 9), turn))] if turn < 3 else path
            advantages = [rng.gauss(0, 1) for index in path if group.nodes[index].kind == "action"]
            group.trajectories.append(Trajectory(path, Status.FINISHED, turn_advantages=advantages))
        assert group.is_branched
        groups.append(group)
    return groups


def held(policy: Policy, groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The groups where a run has them: on the main rank alone."""
    return groups if policy.ranks.is_main else []


def flattened(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The same trajectories, each in a group of its own: nothing is shared."""
    result = []
    for group in groups:
        for trajectory in group.trajectories:
            nodes = [replace(group.nodes[index], parent=place - 1 if place else None) for place, index in enumerate(trajectory.path)]
            result.append(RolloutGroup(group.prompt, nodes, [replace(trajectory, path=list(range(len(nodes))))]))
    return result


def load_hf(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # transformers gives the padding token's embedding no gradient, though chat models pad with a token that ends every turn.
    model.get_input_embeddings().padding_idx = None
    return model


def hf_logprobs(model: torch.nn.Module, context: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-prob of each of `tokens` after `context`, by one plain forward pass of that sequence alone. [len(tokens)]"""
    logits = model(torch.tensor([context + tokens])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
