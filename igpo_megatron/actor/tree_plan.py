"""Who attends to whom in a row of packed trees, worked out once per row from `subtree_end` and used by every layer.

    subtree_end [T] ──> runs of tokens ──> chains: a path from some token down to a leaf, always along the heaviest child
                                             │
       trunk ─ trunk ─ trunk   chain 0:  prefix ()           causal over itself
         └ probe │             chain 1:  prefix trunk[:a]    causal over itself, all of the prefix
                 └ probe       chain 2:  prefix trunk[:b]    ...

Every token is in one chain, so attention costs the sum of each chain times what it sees, with no work on masked pairs:
a trunk with probes costs what the trunk alone costs, and the probes what they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

PLANS = 16
"""Plans kept: more than the micro-batches in flight in any pipeline, so that recomputation finds the plan of its row."""

Range = tuple[int, int]
"""[start, stop) of tokens."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Tokens that attend causally to each other and to everything in `prefix`."""

    prefix: tuple[Range, ...]
    own: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """A chain as index tensors; None where a plain slice does."""

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    mask: torch.Tensor | None
    """[q, k] bool, True where a query sees a key; None for plain causal attention."""


@dataclass(frozen=True, slots=True)
class TreePlan:
    """All chains of a row, and how their outputs go back to the order of its tokens."""

    chains: tuple[Gather, ...]
    order: torch.Tensor | None
    """[T] int64: output of token t stands at order[t] in the concatenated chains; None where it stands at t."""


@dataclass(slots=True)
class _Run:
    """Consecutive tokens of one path with the same subtree_end."""

    start: int
    stop: int
    end: int
    parent: _Run | None
    children: list[_Run] = field(default_factory=list)

    @property
    def tokens(self) -> Range:
        return self.start, self.stop


def chains(subtree_end: Sequence[int]) -> list[Chain]:
    """Split a row into chains, in the order of their first tokens.

    Raises ValueError where `subtree_end` does not describe trees.
    """
    found = []
    for root in _runs(subtree_end):
        heads = [root]
        while heads:
            head = heads.pop()
            prefix, above = [], head.parent
            while above is not None:
                prefix.append(above.tokens)
                above = above.parent
            own, run = [head.tokens], head
            while run.children:
                heaviest = max(run.children, key=lambda child: child.end - child.start)
                heads += [child for child in run.children if child is not heaviest]
                own.append(heaviest.tokens)
                run = heaviest
            found.append(Chain(tuple(prefix[::-1]), tuple(own)))
    return sorted(found, key=lambda chain: chain.own)


def _runs(subtree_end: Sequence[int]) -> list[_Run]:
    """Root runs of a row."""
    roots: list[_Run] = []
    open_runs: list[_Run] = []
    for token, end in enumerate(subtree_end):
        while open_runs and open_runs[-1].end <= token:
            open_runs.pop()
        parent = open_runs[-1] if open_runs else None
        if end <= token or end > (parent.end if parent else len(subtree_end)):
            raise ValueError(f"subtree_end[{token}] = {end} is not the end of a subtree of this row")
        if parent is not None and parent.end == end and parent.stop == token:
            parent.stop += 1
            continue
        run = _Run(token, token + 1, end, parent)
        (parent.children if parent else roots).append(run)
        open_runs.append(run)
    return roots


def plan_of(subtree_end: torch.Tensor) -> TreePlan:
    """The plan of a row; the last `PLANS` different ones are kept, by content, so that every layer and every recomputation shares it."""
    return _plan(subtree_end.to("cpu", torch.int64).numpy().tobytes())


@lru_cache(maxsize=PLANS)
def _plan(subtree_end: bytes) -> TreePlan:
    row = torch.frombuffer(bytearray(subtree_end), dtype=torch.int64).tolist()
    split = chains(row)
    gathers = []
    for chain in split:
        queries, keys = _indices(chain.own), _indices(chain.prefix + chain.own)
        mask = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries)) if chain.prefix else None
        gathers.append(Gather(_slice_or(queries), _slice_or(keys), mask))
    positions = torch.cat([_indices(chain.own) for chain in split])
    order = torch.empty_like(positions)
    order[positions] = torch.arange(len(positions))
    return TreePlan(tuple(gathers), None if bool((order == torch.arange(len(order))).all()) else order)


def _indices(ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])


def _slice_or(indices: torch.Tensor) -> slice | torch.Tensor:
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if stop - start == len(indices) else indices
