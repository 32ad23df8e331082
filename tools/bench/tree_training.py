"""Claim: training on a group as a tree saves the time of the tokens that its trajectories share, with the same gradient.

    python tools/bench/tree_training.py     under 2 minutes on two cores

Groups as branching rollouts make them (16 trajectories: 8 from the prompt, 8 branched off at a uniformly drawn turn, the 7B recipe of
arXiv 2507.19849), and as independent rollouts make them. The same optimizer step is run on the trees and on the trajectories laid out
one by one. `token_ratio`, `speedup` and `max_grad_diff` are those of the branching group.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import finish, interleaved, ratio
from models import config_for, random_policy

from igpo_megatron.algorithms.losses.registry import objective, token_weight
from igpo_megatron.packing.tree import PackedRow, pack_for_training, step_counts
from igpo_megatron.policy import parallel
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, StepCounts, Trajectory

PROMPT, TURN, TURNS = 1000, 800, 10
SAMPLES = {"branching": (8, 16), "independent": (16, 16)}
"""(trajectories from the prompt, trajectories)."""

ROW_TRAJECTORIES = 4
"""Trajectories that a row holds: a tree is cut into pieces of this size, and its path to the cut is repeated."""


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B.")] = "demo",
    repeats: Annotated[int, typer.Option(help="Timed steps of each layout.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/tree_training.json.")] = None,
) -> None:
    """Time both layouts and compare their gradients."""
    from igpo_megatron.policy.policy import Policy

    scale = 1 if torch.cuda.is_available() else 20
    row_tokens = (PROMPT + TURNS * TURN) // scale * ROW_TRAJECTORIES
    with random_policy(shape) as folder:
        config = config_for(folder, loss={"name": "ppo", "kl_coef": 0.0}, optim={"lr": 1e-12, "weight_decay": 0.0})
        policy = Policy(config, parallel.init(config))
        figures: dict[str, Any] = {"shape": shape}
        for name, (roots, samples) in SAMPLES.items():
            group = branched(roots, samples, PROMPT // scale, TURN // scale, TURNS, policy.shape.vocab_size, seed=0)
            figures[name] = measure(policy, group, row_tokens, repeats)
        parallel.shutdown()
    floors = {"note": "token_ratio is what the linear layers save; attention reads the shared context as often as before"}
    shown = figures["branching"]
    headline = {name: shown[name] for name in ("token_ratio", "speedup_over_token_ratio", "max_grad_diff")}
    finish("tree_training", {**headline, "speedup": shown["speedup"]["median"], **figures}, floors, ("torch",), out)


def branched(roots: int, samples: int, prompt: int, turn: int, turns: int, vocab: int, seed: int) -> RolloutGroup:
    """A group of which `samples - roots` trajectories leave an earlier one at a uniformly drawn turn."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    group = RolloutGroup(Prompt("bench", "?", ("answer",), "synthetic"), [Node(None, "prompt", tokens(prompt))])
    for number in range(samples):
        path, start = [0], 1
        if number >= roots:
            source = group.trajectories[rng.randrange(roots)].path
            start = rng.randrange(1, turns + 1)
            path = source[: 2 * start - 1]
        for index in range(start, turns + 1):
            action = Node(path[-1], "action", tokens(turn // 3), index)
            action.old_logprobs = [-6.0] * len(action.token_ids)
            path.append(group.add(action))
            path.append(group.add(Node(path[-1], "observation", tokens(turn - turn // 3), index)))
        group.trajectories.append(Trajectory(path, Status.FINISHED, turn_advantages=[rng.gauss(0, 1) for _ in range(turns)]))
    return group


def flattened(group: RolloutGroup) -> list[RolloutGroup]:
    """Every trajectory as a group of its own."""
    found = []
    for trajectory in group.trajectories:
        nodes = [replace(group.nodes[index], parent=place - 1 if place else None) for place, index in enumerate(trajectory.path)]
        found.append(RolloutGroup(group.prompt, nodes, [replace(trajectory, path=list(range(len(nodes))))]))
    return found


def train(policy: Any, rows: Sequence[PackedRow], counts: StepCounts) -> None:
    """An optimizer step."""
    loss = partial(objective, counts=counts, config=policy.config.loss)
    policy.optimizer_step(policy.forward_backward(rows, loss))


def measure(policy: Any, group: RolloutGroup, row_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step in both layouts, their tokens, and max |difference| of their gradients over max |gradient|."""
    counts = step_counts([group])
    layouts = {
        name: pack_for_training(groups, row_tokens=row_tokens, token_weight=partial(token_weight, "token_mean"))
        for name, groups in (("tree", [group]), ("flat", flattened(group)))
    }
    gradients: dict[str, torch.Tensor] = {}

    def step(name: str) -> None:
        train(policy, layouts[name], counts)
        if name not in gradients:
            gradients[name] = torch.cat([parameter.main_grad.flatten().float() for parameter in policy.chunks[0].parameters()]).clone()

    seconds = interleaved({name: partial(step, name) for name in layouts}, repeats)
    tokens = {name: sum(row.num_tokens for row in rows) for name, rows in layouts.items()}
    token_ratio = tokens["flat"] / tokens["tree"]
    speedup = ratio(seconds["flat"], seconds["tree"])
    gap = (gradients["tree"] - gradients["flat"]).abs().max() / gradients["flat"].abs().max()
    return {
        "tokens": tokens,
        "token_ratio": round(token_ratio, 3),
        "seconds": {name: round(median(values), 4) for name, values in seconds.items()},
        "speedup": speedup,
        "speedup_over_token_ratio": round(speedup["median"] / token_ratio, 3),
        "max_grad_diff": float(gap),
    }


if __name__ == "__main__":
    typer.run(main)
