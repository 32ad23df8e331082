"""Host memory that stays for a run and that a GPU copies from and to by itself: page-locked, and no larger than what it holds.

Torch's own pinned memory, which suits rows that are there for a moment (upload.py), is rounded up to a power of two, tensor by tensor, and
never given back: of a model's weights up to twice as much.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import numpy
import torch

ALIGNMENT = 512
"""Bytes to a multiple of which the place of each tensor in a buffer is rounded up."""


def page_locked(size: int) -> torch.Tensor:
    """`size` bytes, locked until no tensor looks at them any more. Raises RuntimeError where the system allows no more."""
    # Pages of its own: one that two buffers share could be locked for one of them only.
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
