"""Who attends to whom in a row of packed trees, worked out once per row from `subtree_end` and used by every layer.

    subtree_end [T] ──> runs of tokens ──> chains: a path from some token down to a leaf, along the heaviest child
                                             │
       trunk ─ trunk ─ trunk   chain 0:  prefix ()           causal over itself
         └ probe │             chain 1:  prefix trunk[:a]    causal over itself, all of the prefix
                 └ probe       chain 2:  prefix trunk[:b]    ...

Every token is in one chain, so attention costs the sum over chains of their length times the tokens they see: a trunk costs the same
with and without probes, and each probe costs the tokens it reads. Short chains that read almost the same tokens share one call
(`grouped`), because a call and the keys gathered for it cost more than some masked pairs.
Where a rank holds only part of a row, its calls are those of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

PLANS = 16
"""Plans kept: more than the micro-batches in flight in any pipeline, so that recomputation finds the plan of its row."""

CALL_COST, KEY_COST = 8000, 32
"""Cost of a call of SDPA, and of a key gathered for it, in pairs of a query and a key; measured on a CPU at 4 heads of 32."""

NEXT_BONUS = 2 * KEY_COST
"""Tokens by which a child that follows its parent directly may be lighter and still continue the chain, which then is a slice."""

GROUP = 16
"""Chains considered for one call."""

Range = tuple[int, int]
"""[start, stop) of tokens."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Tokens that attend causally to each other and to everything in `prefix`."""

    prefix: tuple[Range, ...]
    own: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """The chains of one call as index tensors, or slices where those do."""

    queries: slice | torch.Tensor
    """Of the tokens that this rank holds."""

    keys: slice | torch.Tensor
    """Of the tokens of the row."""

    mask: torch.Tensor | None
    """[q, k] fp32, 0 where a query sees a key and -inf elsewhere; None: the last query sees all keys, each one before it one less."""


@dataclass(frozen=True, slots=True)
class TreePlan:
    """All calls for a row, and how their outputs go back to the order of its tokens."""

    calls: tuple[Gather, ...]
    order: torch.Tensor | None
    """[t] int64: output of the n-th token held stands at order[n] in the concatenated calls; None where it stands at n."""


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
                next_run = max(run.children, key=lambda child: child.end - child.start + (NEXT_BONUS if child.start == run.stop else 0))
                heads += [child for child in run.children if child is not next_run]
                own.append(next_run.tokens)
                run = next_run
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


def plan_of(subtree_end: torch.Tensor, held: tuple[Range, ...] | None = None) -> TreePlan:
    """The plan of the tokens `held` (ascending; None: all) of a row.

    The last `PLANS` different ones are kept, by content, so that every layer and every recomputation shares them.
    """
    return _plan(subtree_end.to("cpu", torch.int64).numpy().tobytes(), _union(held or ((0, len(subtree_end)),)))


@lru_cache(maxsize=PLANS)
def _plan(subtree_end: bytes, held: tuple[Range, ...]) -> TreePlan:
    ends = torch.frombuffer(bytearray(subtree_end), dtype=torch.int64)
    tokens = _indices(held)
    gathers, order_of_calls = [], []
    for group in grouped(chains(ends.tolist())):
        own, read = _indices(_own(group)), _indices(_read(group))
        # An early range sees fewer keys than a late one, so each has a call of its own.
        for start, stop in held:
            queries = own[(own >= start) & (own < stop)]
            if not len(queries):
                continue
            keys, mask = read[read <= queries[-1]], None
            if len(group) > 1:
                unseen = (keys[None, :] > queries[:, None]) | (queries[:, None] >= ends[keys][None, :])
                read_here = ~unseen.all(0)
                # Added to the logits by every layer: SDPA would turn a bool mask into this each time.
                keys, mask = keys[read_here], torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, read_here]
            gathers.append(Gather(_slice_or(torch.searchsorted(tokens, queries)), _slice_or(keys), mask))
            order_of_calls.append(queries)
    order = torch.argsort(torch.cat(order_of_calls))
    return TreePlan(tuple(gathers), None if bool((order == torch.arange(len(order))).all()) else order)


def grouped(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Split the chains into calls: every chain without a prefix alone (plain causal attention), the others as it costs least."""
    calls = [[chain] for chain in chains if not chain.prefix]
    rest = [chain for chain in chains if chain.prefix]
    # best[n]: least cost of the first n chains, and where the last call among them begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(rest) + 1):
        best.append(min((best[start][0] + _cost(rest[start:stop]), start) for start in range(max(0, stop - GROUP), stop)))
    stop, found = len(rest), []
    while stop:
        found.append(rest[best[stop][1] : stop])
        stop = best[stop][1]
    return calls + found[::-1]


def _cost(group: Sequence[Chain]) -> float:
    read = _read(group)
    keys = sum(stop - start for start, stop in read)
    queries = sum(stop - start for start, stop in _own(group))
    return CALL_COST + queries * keys + (KEY_COST * keys if len(read) > 1 else 0)


def _own(group: Sequence[Chain]) -> tuple[Range, ...]:
    return _union(tokens for chain in group for tokens in chain.own)


def _read(group: Sequence[Chain]) -> tuple[Range, ...]:
    return _union(tokens for chain in group for tokens in chain.prefix + chain.own)


def _union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ascending, disjoint, not adjacent."""
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def _indices(ranges: Sequence[Range]) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in ranges])


def _slice_or(indices: torch.Tensor) -> slice | torch.Tensor:
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if stop - start == len(indices) else indices
