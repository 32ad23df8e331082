"""Write files of torch.save with clear errors. Read them without building arbitrary Python objects, and without reading their tensors.

torch.save writes a zip archive, not compressed: `NAME/data.pkl` describes the object, `NAME/data/0` and so on are the bytes of its tensors.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoint_conversion.rules import ConversionError

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Local header of a zip archive's entry, 30 bytes: the lengths of its name and of its extra field come last."""


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
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConversionError(f"{path} is not a complete file of torch.save ({error}); copy the checkpoint again") from error


def map_tensor(file: mmap.mmap, start: int, length: int) -> Tensor:
    """The one tensor of an archive inside a larger file, mapped in place.

    Raises ValueError if there is no archive of one tensor.
    """
    view = memoryview(file)[start : start + length]
    try:
        with zipfile.ZipFile(_Bytes(view)) as archive:
            entries = {name.partition("/")[2]: entry for name, entry in ((entry.filename, entry) for entry in archive.infolist())}
        at, size = _content(view, entries["data.pkl"])
        described = _Describer(io.BytesIO(view[at : at + size])).load()
        if not isinstance(described, _Tensor):
            raise ValueError(f"{described!r} is no tensor")
        at, size = _content(view, entries[f"data/{described.storage_key}"])
        empty = 0 in described.shape
        steps = zip(described.shape, described.stride, strict=True)
        last = described.offset + sum((count - 1) * stride for count, stride in steps)
        if not empty and (min((described.offset, *described.stride), default=0) < 0 or (last + 1) * described.dtype.itemsize > size):
            raise ValueError(f"a tensor {described.shape} with strides {described.stride} does not fit into {size} bytes")
    except (zipfile.BadZipFile, KeyError, struct.error, pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"no archive of one tensor: {error!r}") from error
    if empty:
        return torch.empty(described.shape, dtype=described.dtype)
    raw = torch.frombuffer(file, dtype=torch.uint8, count=size, offset=start + at)
    aligned = raw if raw.data_ptr() % described.dtype.itemsize == 0 else raw.clone()
    return aligned.view(described.dtype).as_strided(described.shape, described.stride, described.offset)


def _content(view: memoryview, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """(where an entry's bytes begin, how many they are). Not read by `zipfile`, because torch may leave their checksum out."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
    name, extra = _LOCAL_HEADER.unpack(view[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size])
    return entry.header_offset + _LOCAL_HEADER.size + name + extra, entry.file_size


class _Bytes(io.RawIOBase):
    """Memory as a file, without a copy of it."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


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


class _Tensor:
    """A pickled tensor's description."""

    def __init__(self, storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *rest: Any) -> None:
        self.dtype, self.storage_key = storage
        self.offset, self.shape, self.stride = offset, tuple(shape), tuple(stride)


_STORAGE_DTYPES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16},
    **{"LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8},
    **{"ByteStorage": torch.uint8, "BoolStorage": torch.bool},
}


class _Describer(_Unpickler):
    """Builds the description of a tensor instead of the tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        return _STORAGE_DTYPES[name] if module == "torch" and name in _STORAGE_DTYPES else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        _, dtype, key, *_ = pid
        return dtype, key


_INERT = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")
