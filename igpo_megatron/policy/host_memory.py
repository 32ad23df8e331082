"""Page-locked host memory, from and to which a GPU copies by itself: for a run, or for a moment.

    for a run      `page_locked`, `kept_on_host`: no larger than its contents
    for a moment   `upload`: a record's tensors ──side by side──> one buffer ──one copy that the host does not wait for──> the device

A copy from ordinary memory holds up the host, and with it the launch of the next kernels. Torch keeps the buffer of an upload until the
copy is done and then reuses it. It rounds each pinned buffer up to a power of two and never gives it back: for uploads
at most twice the size of the records in flight. For a model's weights that could double the memory, so they use `page_locked`.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy
import torch

ALIGNMENT = 512
"""Bytes to a multiple of which the place of each tensor in a buffer is rounded up."""


def page_locked(size: int) -> torch.Tensor:
    """`size` bytes, locked as long as a tensor refers to them. Raises RuntimeError where the system refuses."""
    # It has its own pages: a page that two buffers share could be locked for only one of them.
    pages = numpy.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), numpy.uint8)
    host = torch.from_numpy(pages)
    driver = torch.cuda.cudart()
    error = int(driver.cudaHostRegister(host.data_ptr(), size, 0))  # as torch.distributed.checkpoint does
    if error:
        raise RuntimeError(f"{size / 2**30:.1f} GiB of host memory could not be page-locked (cudaError {error})")
    weakref.finalize(pages, driver.cudaHostUnregister, host.data_ptr()).atexit = False
    return host


def kept_on_host(tensors: Sequence[torch.Tensor], *, locked: bool) -> list[torch.Tensor]:
    """Copies of the tensors side by side in one buffer on the host, page-locked or not."""
    size = room_for(tensors)
    copies = side_by_side(page_locked(size) if locked else torch.empty(size, dtype=torch.uint8), tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies


def room_for(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of a buffer that holds them side by side."""
    return sum(rounded(tensor.nbytes) for tensor in tensors)


def side_by_side(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor's place in a buffer of bytes: views of its dtype and shape, whose contents are the buffer's."""
    places = []
    for tensor in tensors:
        places.append(buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        buffer = buffer[rounded(tensor.nbytes) :]
    return places


def rounded(size: int) -> int:
    """Bytes of a place for `size` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


Record = TypeVar("Record")


def upload(record: Record, device: torch.device) -> Record:
    """A tensor, or a dataclass or tuple of them at any depth, with its tensors on `device`, each copied once however often it occurs.

    The copies are queued on the current stream, before anything that is launched later. On CPU it returns the record itself.
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
    staged = _staging(room_for(tensors))
    for place, tensor in zip(side_by_side(staged, tensors), tensors, strict=True):
        place.copy_(tensor)
    return side_by_side(staged.to(device, non_blocking=True), tensors)


def _staging(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
