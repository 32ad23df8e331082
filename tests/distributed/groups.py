"""Small random rollout groups, and what transformers says of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from conftest import VOCAB

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


def load_hf(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def hf_logprobs(model: torch.nn.Module, context: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-prob of each of `tokens` after `context`, by one plain forward pass of that sequence alone. [len(tokens)]"""
    logits = model(torch.tensor([context + tokens])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
