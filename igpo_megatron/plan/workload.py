"""A step's trajectories and the rows they are packed into: drawn from the workload's distributions, or read from a run's rollout files."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median, pstdev

from igpo_megatron.plan.types import Row, Workload
from igpo_megatron.types import UserError


@dataclass(frozen=True, slots=True)
class Draw:
    """One trajectory: what each turn samples, reads and waits for."""

    prompt: int
    sampled: tuple[int, ...]
    """Tokens per turn."""

    observed: tuple[int, ...]
    """Tokens of each tool result; one less than turns."""

    waits: tuple[float, ...]
    """Seconds of each tool call."""

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.sampled) + sum(self.observed)


@lru_cache(maxsize=16)
def draw(workload: Workload) -> tuple[Draw, ...]:
    """A step's trajectories; the same for the same workload."""
    rng = random.Random(workload.seed)
    stop = 1 / workload.turns
    turn_mu = math.log(workload.turn_tokens) - workload.turn_sigma**2 / 2
    found = []
    for _ in range(workload.trajectories):
        turns = 1
        while turns < workload.max_turns and rng.random() > stop:
            turns += 1
        sampled, observed, room = [], [], workload.max_context - workload.prompt_tokens
        for turn in range(turns):
            length = min(max(1, round(rng.lognormvariate(turn_mu, workload.turn_sigma))), max(1, room))
            sampled.append(length)
            result = min(round(workload.observation_tokens), room - length - 1)  # one token is left to answer with
            if turn == turns - 1 or result < 1:
                break
            observed.append(result)
            room -= length + result
        waits = tuple(rng.lognormvariate(math.log(workload.tool_median), workload.tool_sigma) for _ in observed)
        found.append(Draw(workload.prompt_tokens, tuple(sampled[: len(observed) + 1]), tuple(observed), waits))
    return tuple(found)


@lru_cache(maxsize=64)
def rows_of(workload: Workload, row_tokens: int) -> tuple[Row, ...]:
    """The rows of a training pass: a group shares its prompt, and is cut where it exceeds the budget."""
    from igpo_megatron.packing.batches import first_fit

    trajectories = draw(workload)
    pieces: list[Row] = []
    for number, one in enumerate(trajectories):
        own = one.tokens - one.prompt
        if number % workload.samples == 0 or pieces[-1].tokens + own > row_tokens:
            pieces.append(Row(workload.prompt_tokens, workload.prompt_tokens**2 / 2, 0))
        last = pieces[-1]
        pieces[-1] = Row(last.tokens + own, last.pairs + own * (one.prompt + own / 2), last.targets + sum(one.sampled))
    bins = first_fit([piece.tokens for piece in pieces], row_tokens)
    return tuple(
        Row(sum(pieces[i].tokens for i in part), sum(pieces[i].pairs for i in part), sum(pieces[i].targets for i in part)) for part in bins
    )


@lru_cache(maxsize=512)
def shares_of(workload: Workload, row_tokens: int, data: int, multiple: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of each data-parallel rank, padded with blank rows to a common number."""
    from igpo_megatron.packing.batches import balance

    rows = rows_of(workload, row_tokens)
    blank = Row(multiple, 1, 0)
    return tuple(tuple(rows[index] if index >= 0 else blank for index in share) for share in balance([row.tokens for row in rows], data))


def from_rollouts(paths: Sequence[Path], like: Workload) -> Workload:
    """The distribution of recorded rollouts; tool latencies, which the files do not hold, stay those of `like`."""
    from igpo_megatron.observability.rollout_dump import read_rollouts

    prompts, turns, sampled, observed, longest, samples = [], [], [], [], 0, []
    for path in paths:
        for _, groups in read_rollouts(path):
            for group in groups:
                samples.append(len(group.trajectories))
                prompts += [len(node.token_ids) for node in group.nodes if node.kind == "prompt"]
                sampled += [len(node.token_ids) for node in group.nodes if node.kind == "action" and node.token_ids]
                observed += [len(node.token_ids) for node in group.nodes if node.kind == "observation"]
                for trajectory in group.trajectories:
                    turns.append(len(group.actions(trajectory)))
                    longest = max(longest, sum(len(group.nodes[index].token_ids) for index in trajectory.path))
    if not sampled:
        raise UserError(f"--rollouts {', '.join(map(str, paths))}: no sampled turn in them; give rollout files (parquet) of a run")
    return replace(
        like,
        samples=round(median(samples)),
        prompt_tokens=round(fmean(prompts)),
        turns=fmean(turns),
        max_turns=max(turns),
        turn_tokens=fmean(sampled),
        turn_sigma=pstdev(map(math.log, sampled)),
        observation_tokens=fmean(observed) if observed else 1.0,
        max_context=max(longest, like.max_context),
        source=f"measured: {len(turns)} trajectories of {len(paths)} files (tool latency assumed)",
    )
