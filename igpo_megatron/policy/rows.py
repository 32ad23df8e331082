"""Send rows from the main rank, which alone holds the batch: every data-parallel part of the ranks gets its own.

    main rank ──a part's rows──> first rank of the part ──the same──> its tensor, context and pipeline ranks

They travel between the hosts' memories (gloo), so a GPU holds the row that it computes and no other.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from igpo_megatron.packing.tree import PackedRow
from igpo_megatron.packing.wire import from_bytes, to_bytes
from igpo_megatron.policy.parallel import Ranks
from igpo_megatron.supervision.waits import waiting


@dataclass(slots=True)
class Share:
    """The rows that one data-parallel part of the ranks computes."""

    rows: list[PackedRow]
    places: list[int]
    """Of each row among all rows of the batch; -1 for a blank row."""


def deal(shares: Sequence[Share], ranks: Ranks) -> Share:
    """This rank's share of those that the main rank gives, one per data-parallel part; the other ranks give none. Collective.

    Rows that were sent come without `origin`: results are assigned to their nodes on the main rank.
    """
    share, message = (shares[0] if ranks.is_main else Share([], [])), torch.empty(0)
    with waiting(*("the others to take their rows", "the other ranks") if ranks.is_main else ("its rows", "rank 0")):
        if ranks.leads_part:
            group = parallel_state.get_data_parallel_group_gloo()
            for part, theirs in enumerate(shares[1:], start=1):
                _send(_message(theirs), partial(dist.send, group=group, group_dst=part))
            if not ranks.is_main:
                message = _received(partial(dist.recv, group=group, group_src=0))
        if ranks.part is not None:
            move = partial(dist.broadcast, group=ranks.part, group_src=0)
            if ranks.leads_part:
                message = _message(share) if ranks.is_main else message
                _send(message, move)
            else:
                message = _received(move)
    return share if ranks.is_main else _opened(message)


def _message(share: Share) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps((share.places, to_bytes(share.rows)))), dtype=torch.uint8)


def _opened(message: torch.Tensor) -> Share:
    places, rows = pickle.loads(message.numpy().tobytes())
    return Share(from_bytes(rows), places)


def _send(message: torch.Tensor, move: Callable[[torch.Tensor], Any]) -> None:
    move(torch.tensor([len(message)]))
    move(message)


def _received(move: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    size = torch.zeros(1, dtype=torch.int64)
    move(size)
    message = torch.empty(int(size), dtype=torch.uint8)
    move(message)
    return message
