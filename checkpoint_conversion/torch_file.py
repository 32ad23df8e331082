"""Write files of torch.save with clear errors. Read them without building arbitrary Python objects, and without reading their tensors.

torch.save writes a zip archive, not compressed: `NAME/data.pkl` describes the object, `NAME/data/0` and so on are the bytes of its tensors.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

# A part of a file as a file, by which torch's own reader of distributed checkpoints reads.
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoint_conversion.rules import ConversionError


def append_archive(file: BinaryIO, content: Any) -> None:
    """torch.save at the end of an open file. Raises OSError when the disk refuses, where torch.save may raise a RuntimeError."""
    tail = _Tail(file)
    try:
        torch.save(content, tail)
    except RuntimeError as error:
        if tail.refused is None:
            raise
        raise tail.refused from error


class _Tail(io.RawIOBase):
    """The end of an open file as a stream of its own, because torch.save writes offsets from the start of its stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.refused: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.refused = self.refused or error
            raise


def load_mapped(path: Path) -> Any:
    """What `torch.save` wrote, its tensors mapped from the file; only tensors and plain values are built, the rest are stand-ins.

    Raises ConversionError if the file is not complete.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_INERT)
    except (*_DAMAGED, ValueError) as error:
        raise ConversionError(f"{path} is not a complete file of torch.save ({error}); copy the checkpoint again") from error


def map_file(path: Path) -> Tensor:
    """A file's bytes, [N] uint8, mapped; the file does not stay open."""
    # A private mapping, because torch requires writable memory; nothing is written to it.
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def map_tensor(file: IO[bytes], content: Tensor, start: int, length: int) -> Tensor:
    """The one tensor of an archive inside a larger file, a part of the file's `content` (`map_file`).

    Raises ValueError if there is no archive of one tensor.
    """
    try:
        described = torch.load(_create_file_view(file, start, length), map_location="meta", weights_only=True)
        if not isinstance(described, Tensor):
            raise ValueError(f"a {type(described).__name__} is no tensor")
        needed = described.untyped_storage().nbytes()
        archive = torch._C.PyTorchFileReader(_create_file_view(file, start, length))
        (record,) = [name for name in archive.get_all_records() if name.startswith("data/")]
        at, size = start + archive.get_record_offset(record), archive.get_record_size(record)
    except _DAMAGED as error:
        # torch hides what it found behind the advice to load the file unsafely.
        raise ValueError(f"no archive of one tensor: {error.__context__ or error!r}") from error
    size = min(size, start + length - at)
    if needed > size:
        raise ValueError(f"a tensor of {needed} bytes does not fit into {size} bytes")
    if not described.numel():
        return torch.empty(described.shape, dtype=described.dtype)
    raw = content[at : at + needed]
    aligned = raw if raw.data_ptr() % described.dtype.itemsize == 0 else raw.clone()
    values = aligned.view(described.dtype)
    return values.as_strided(described.shape, described.stride(), values.storage_offset() + described.storage_offset())


_DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, AssertionError, ArithmeticError, MemoryError),
    *(LookupError, AttributeError, TypeError),
)
"""What torch.load raises for damaged bytes, besides ValueError."""


class _StandIn:
    """Takes the place of an object that is not needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_BUILT = {
    ("argparse", "Namespace"),
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILT or (
            module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype))
        ):
            return super().find_class(module, name)
        return _StandIn


_METADATA = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata"),
    "_MEM_FORMAT_ENCODING",
)
_INDEX = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
}


class _IndexUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return pickle.Unpickler.find_class(self, module, name) if (module, name) in _INDEX else super().find_class(module, name)


def load_index(path: Path) -> Any:
    """The pickled index of a torch_dist checkpoint, of which only its own classes are built. Raises what a damaged pickle raises."""
    with path.open("rb") as file:
        return _IndexUnpickler(file).load()


_INERT = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")
