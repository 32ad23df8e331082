"""Rows leave the main rank, which alone holds the batch: every data-parallel part of the ranks gets its own.

    main rank ──a part's rows──> first rank of the part ──the same──> its tensor, context and pipeline ranks

They travel as one buffer of bytes between hosts' memories (gloo), so a GPU holds the row it computes and no other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from igpo_megatron.packing.tree import PackedRow
from igpo_megatron.policy.host_memory import room_for, side_by_side
from igpo_megatron.policy.parallel import Ranks
from igpo_megatron.supervision.waits import waiting


@dataclass(slots=True)
class Share:
    """What one data-parallel part of the ranks computes."""

    rows: list[PackedRow]
    places: list[int]
    """Of each row among all rows of the batch; -1 for a blank row."""


def deal(shares: Sequence[Share], ranks: Ranks) -> Share:
    """This rank's share of those that the main rank gives, one per data-parallel part; the other ranks give none. Collective.

    Rows that have travelled come without `origin`: results are carried back to their nodes on the main rank.
    """
    share = shares[0] if ranks.is_main else Share([], [])
    with waiting("its rows", on="the other ranks" if ranks.is_main else "rank 0"):
        if ranks.leads_part:
            group = parallel_state.get_data_parallel_group_gloo()
            for part, theirs in enumerate(shares[1:], start=1):
                _send(theirs, partial(dist.send, group=group, group_dst=part))
            if not ranks.is_main:
                share = _receive(partial(dist.recv, group=group, group_src=0))
        if ranks.part is not None:
            move = partial(dist.broadcast, group=ranks.part, group_src=0)
            if ranks.leads_part:
                _send(share, move)
            else:
                share = _receive(move)
    return share


def _send(share: Share, move: Callable[[torch.Tensor], Any]) -> None:
    tensors = [tensor for row in share.rows for tensor in _tensors(row).values()]
    shapes = [replace(row, origin=[], **{name: tensor.to("meta") for name, tensor in _tensors(row).items()}) for row in share.rows]
    header = torch.frombuffer(bytearray(pickle.dumps(replace(share, rows=shapes))), dtype=torch.uint8)
    contents = torch.empty(room_for(tensors), dtype=torch.uint8)
    for place, tensor in zip(side_by_side(contents, tensors), tensors, strict=True):
        place.copy_(tensor)
    move(torch.tensor([header.nbytes, contents.nbytes]))
    for part in (header, contents):
        move(part)


def _receive(move: Callable[[torch.Tensor], Any]) -> Share:
    sizes = torch.zeros(2, dtype=torch.int64)
    move(sizes)
    header, contents = (torch.empty(size, dtype=torch.uint8) for size in sizes.tolist())
    for part in (header, contents):
        move(part)
    share: Share = pickle.loads(header.numpy().tobytes())
    places = iter(side_by_side(contents, [shape for row in share.rows for shape in _tensors(row).values()]))
    return replace(share, rows=[replace(row, **{name: next(places) for name in _tensors(row)}) for row in share.rows])


def _tensors(row: PackedRow) -> dict[str, torch.Tensor]:
    """Its tensors by the names of their fields."""
    named = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
