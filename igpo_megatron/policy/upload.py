"""Copies to the device that the host does not wait for.

    record on the host ──its tensors side by side──> one page-locked buffer ──one copy──> the record with views of the buffer's copy

From ordinary memory a copy holds up the host, and with it the launch of the next kernels. Torch keeps the buffer until the copy is done
and gives it to a later one, so no more is locked than twice what the records in flight hold: it rounds up to a power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch

from igpo_megatron.policy.host_memory import room_for, side_by_side

Record = TypeVar("Record")


def upload(record: Record, device: torch.device) -> Record:
    """A tensor, or a dataclass or tuple of them at any depth, with its tensors on `device`, each copied once however often it occurs.

    The copies are in order with what is launched next, on the current stream. On CPU the record itself.
    """
    if device.type == "cpu":
        return record
    held: dict[int, torch.Tensor] = {}
    _map(record, lambda tensor: held.setdefault(id(tensor), tensor))
    copies = dict(zip(held, _copied(list(held.values()), device), strict=True))
    return cast(Record, _map(record, lambda tensor: copies[id(tensor)]))


def _map(record: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The record with every tensor changed."""
    if isinstance(record, torch.Tensor):
        return change(record)
    if isinstance(record, tuple):
        return tuple(_map(part, change) for part in record)
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{field.name: _map(getattr(record, field.name), change) for field in fields(record)})
    return record


def _copied(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    staged = _page_locked(room_for(tensors))
    for place, tensor in zip(side_by_side(staged, tensors), tensors, strict=True):
        place.copy_(tensor)
    return side_by_side(staged.to(device, non_blocking=True), tensors)


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
