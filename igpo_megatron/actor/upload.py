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

from igpo_megatron.actor.host_memory import rounded

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
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + rounded(size))
    staged = _page_locked(starts[-1])

    def place(buffer: torch.Tensor, number: int) -> torch.Tensor:
        tensor = tensors[number]
        return buffer[starts[number] : starts[number] + sizes[number]].view(tensor.dtype).view(tensor.shape)

    for number, tensor in enumerate(tensors):
        place(staged, number).copy_(tensor)
    there = staged.to(device, non_blocking=True)
    return [place(there, number) for number in range(len(tensors))]


def _page_locked(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
