"""One version of all weights in a file in shared memory, and the fingerprints that follow each tensor on its way.

    named tensors ──in_buckets──> SharedWeights.write(bucket) ──file──> read(entries) ──> model
                        └─ fingerprint of what was exported      └─ fingerprint of what arrived

The file is kept after a transfer: restarted engines are filled from it.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from igpo_megatron.supervision.leftovers import claimed, remove_abandoned
from igpo_megatron.types import NamedTensors, SyncError

_ALIGNMENT = 64
_PREFIX = "igpo-weights-"
_LANES = 2**18  # int32 lanes mixed at a time, so that intermediate values stay in the cache


@dataclass(frozen=True, slots=True)
class Received:
    """One tensor as an engine was about to load it."""

    name: str
    dtype: str
    """As in `torch`, e.g. `bfloat16`."""

    shape: tuple[int, ...]
    fingerprint: int


@dataclass(frozen=True, slots=True)
class Entry(Received):
    """One tensor of a transfer as it was exported, and its place in the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together."""

    number: int
    """0 for the first of a transfer."""

    entries: tuple[Entry, ...]

    @property
    def begin(self) -> int:
        """Its first byte in the file."""
        return self.entries[0].offset

    @property
    def nbytes(self) -> int:
        """Its bytes in the file, gaps between tensors included."""
        return self.entries[-1].offset + self.entries[-1].nbytes - self.begin


def in_buckets(named_tensors: NamedTensors, size: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The same tensors in the same order, in lists of at most `size` bytes; a larger tensor is alone in its list."""
    bucket: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in named_tensors:
        if bucket and held + tensor.nbytes > size:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    if bucket:
        yield bucket


def fingerprint(tensor: torch.Tensor) -> int:
    """A checksum that changes with any value, the order of the bytes and their number; computed on the tensor's device.

    The bytes are taken as int32 lanes x_i, padded with zeros, and h = sum_i mix(x_i XOR (i + 1) * c) over 64 bits. mix is a bijection
    (multiplications by odd constants around a shift, as in MurmurHash3's finaliser), so a change of one lane always shows, and two lanes
    that change places go unseen once in 2^32. It guards against accidents, not against an attacker.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4 or flat.storage_offset() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    lanes = flat.view(torch.int32)
    places = torch.arange(1, min(lanes.numel(), _LANES) + 1, dtype=torch.int32, device=lanes.device).mul_(-1640531527)
    total = torch.zeros((), dtype=torch.int64, device=lanes.device)
    for start in range(0, lanes.numel(), _LANES):
        part = lanes[start : start + _LANES]
        # (i + 1) c = (i - start + 1) c + start c, modulo 2^32
        mixed = part ^ (places[: part.numel()] + _as_int32(start * -1640531527))
        mixed.mul_(-2048144789)
        mixed ^= mixed >> 15
        mixed.mul_(-1028477387)
        total += mixed.sum(dtype=torch.int64)
    return int(total)


def received(name: str, tensor: torch.Tensor) -> Received:
    """The record of a tensor that is exported, or that an engine is about to load."""
    return Received(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), fingerprint(tensor))


class SharedWeights:
    """A file in shared memory, readable by this user only, with one version of all weights."""

    def __init__(self) -> None:
        room = Path("/dev/shm")
        folder = room if os.access(room, os.W_OK) else Path(tempfile.gettempdir())
        remove_abandoned(folder, _PREFIX)
        self.path, self._claim = claimed(partial(_new_file, folder))
        self._descriptor = os.open(self.path, os.O_RDWR)

    def write(self, number: int, tensors: Sequence[tuple[str, torch.Tensor]], begin: int) -> Bucket:
        """Write bucket `number` at the first aligned byte from `begin` on."""
        entries, cursor = [], begin
        for name, tensor in tensors:
            cursor += -cursor % _ALIGNMENT
            data = tensor.detach().to("cpu").contiguous()
            entries.append(Entry(**asdict(received(name, tensor)), offset=cursor, nbytes=data.nbytes))
            self.write_bytes(_memory_of(data), cursor)
            cursor += data.nbytes
        return Bucket(number, tuple(entries))

    def write_bytes(self, data: memoryview, begin: int) -> None:
        """Write bytes at `begin`. Raises SyncError if the file system is full."""
        written = 0
        while written < data.nbytes:
            try:
                written += os.pwrite(self._descriptor, data[written:], begin + written)
            except OSError as error:
                raise SyncError(
                    f"the weights do not fit into {self.path.parent} ({error.strerror} at byte {begin + written}); it must have room for "
                    "all of them: enlarge it (docker run --shm-size)"
                ) from None

    def read_bytes(self, bucket: Bucket) -> torch.Tensor:
        """A bucket's bytes, as a view of the file. uint8 [nbytes]"""
        return _mapped(str(self.path), bucket.begin + bucket.nbytes)[bucket.begin :]

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        os.close(self._claim)


def _new_file(folder: Path) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    os.close(descriptor)
    return Path(name)


def read(path: str, entries: Iterable[Entry]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, as views of the mapped file."""
    entries = list(entries)
    buffer = _mapped(path, max((entry.offset + entry.nbytes for entry in entries), default=0))
    for entry in entries:
        part = buffer[entry.offset : entry.offset + entry.nbytes]
        yield entry.name, part.view(getattr(torch, entry.dtype)).view(entry.shape)


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes. `numpy()` would pin its storage, which a policy that leaves its device must be able to free."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _mapped(path: str, size: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
