"""Context parallelism: a row's tokens are spread over the ranks of a group, which together run one row.

    row [T] ──zigzag──> rank r: chunks r and 2n-1-r of 2n ──> embedding, projections, MLPs on T / n tokens
                                                           ──> attention: own queries; keys and values of the row, gathered
    log-probs of own targets ──gathered──> [N] on every rank ──> loss of the whole row, gradient of own targets

A late token sees more keys than an early one, so each rank gets an early and a late chunk. Keys and values are gathered in each layer
(backward: their gradients are summed and scattered), so the mask stays the row's `subtree_end` and trees are as exact as flat rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from igpo_megatron.packing.tree import PackedRow
from igpo_megatron.policy.tree_plan import Range


@dataclass(frozen=True, slots=True)
class Merge:
    """How rows of several ranks are put into one order: those of each rank are padded to `most`, gathered, and picked by `slot`."""

    most: int
    slot: torch.Tensor
    """[N] int64, where each row stands among the [ranks * most] gathered."""


@dataclass(frozen=True, slots=True)
class RowPart:
    """Model input of one rank in a context-parallel group: t = T / n of a row's tokens, and the targets they predict."""

    token_ids: torch.Tensor
    """[t] int64"""

    position_ids: torch.Tensor
    """[t] int64, depth in the tree."""

    experts: torch.Tensor | None
    """[t, layers, top_k] int64, as in PackedRow."""

    predictor: torch.Tensor
    """[n] int64, index in [0, t)."""

    targets: torch.Tensor
    """[n] int64"""

    probed: torch.Tensor | None
    """[n] bool, as in PackedRow."""

    merge: Merge | None
    """Of the targets that the ranks predict, into the order of the row's; None where one rank predicts them all."""

    numbers: torch.Tensor | None
    """[n] int64, which of the row's targets these are; None for all."""


def part_of(row: PackedRow, rank: int, size: int) -> RowPart:
    """The part of a row for `rank` of the `size` ranks that share it. Call it on the host, where counting keeps no device waiting."""
    if size == 1:
        return RowPart(row.token_ids, row.position_ids, row.experts, row.predictor, row.targets, row.probed, None, None)
    tokens = torch.cat([torch.arange(start, stop) for start, stop in zigzag(row.num_tokens, rank, size)])
    chunk = row.predictor // (row.num_tokens // (2 * size))
    owner = torch.minimum(chunk, 2 * size - 1 - chunk)
    mine = torch.nonzero(owner == rank)[:, 0]
    return RowPart(
        token_ids=row.token_ids[tokens],
        position_ids=row.position_ids[tokens],
        experts=None if row.experts is None else row.experts[tokens],
        predictor=torch.searchsorted(tokens, row.predictor[mine]),
        targets=row.targets[mine],
        probed=None if row.probed is None else row.probed[mine],
        merge=merge_of(owner, size),
        numbers=mine,
    )


def merge_of(owner: torch.Tensor, size: int) -> Merge:
    """The merge of N rows of which rank `owner[n]` holds row n; every rank holds its rows in this order."""
    counts = torch.bincount(owner, minlength=size)
    most = max(int(counts.max()), 1)
    # Row n is the k-th of its owner's: find k by counting earlier rows of the same owner.
    order = torch.argsort(owner, stable=True)
    offsets = torch.cumsum(counts, 0) - counts
    slot = torch.empty_like(owner)
    slot[order] = torch.arange(len(owner)) - offsets[owner[order]]
    return Merge(most, owner * most + slot)


def zigzag(length: int, rank: int, size: int) -> tuple[Range, Range]:
    """Tokens that a rank holds, as [start, stop): `zigzag(8, 0, 2) == ((0, 2), (6, 8))`."""
    assert length % (2 * size) == 0, f"a row of {length} tokens cannot be cut into {2 * size} equal chunks"
    chunk = length // (2 * size)
    return (rank * chunk, (rank + 1) * chunk), (length - (rank + 1) * chunk, length - rank * chunk)


def gather_tokens(tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tokens of all ranks in the order of the row: [t, ...] -> [T, ...]. Gradients of all ranks reach the rank a token came from."""
    gathered = tensor_parallel.gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=True, group=group)
    return in_row_order(gathered, group.size())


def in_row_order(gathered: torch.Tensor, size: int) -> torch.Tensor:
    """[T, ...] rank by rank -> [T, ...] token by token."""
    pairs = gathered.unflatten(0, (size, 2, -1))
    return torch.cat((pairs[:, 0], pairs[:, 1].flip(0))).flatten(0, 1)
