"""The header of a GGUF file, read with every length checked: the file may come from anywhere, and the libraries trust what it says.

    magic, version, counts │ metadata: key, type, value │ tensors: name, dimensions, type, offset │ padding │ data

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md is the format. Little-endian files of versions 2 and 3 are read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_conversion import ConversionError

EXTRA = "pip install igpo-megatron[llm]"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> its struct code."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_SHOWN = {"general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"}
"""Texts of the metadata that are shown as they are."""


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """In torch's order: the last dimension is the one that lies in one piece."""
    type_id: int
    """Of ggml; 0 is float32."""
    offset: int
    """From the file's beginning, in bytes."""
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself. All tensors lie inside the file."""

    path: Path
    metadata: dict[str, Any]
    """Key -> bool, int, float, str, list[str], or a numpy array of numbers."""
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Such as `llama` or `qwen2`."""
        return str(self.text("general.architecture"))

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string of the metadata. Raises ConversionError where it is of another kind, or missing without a default."""
        return self._value(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata, 0 or more."""
        found = self._value(key, int, default)
        if isinstance(found, bool) or found is None or found < 0:
            raise ConversionError(f"{self.path}: {key} is {found!r}, which is no whole number of 0 or more")
        return int(found)

    def number(self, key: str, default: float) -> float:
        """A finite number of the metadata."""
        found = self._value(key, (int, float), default)
        if not math.isfinite(found):
            raise ConversionError(f"{self.path}: {key} is {found}, which is no number")
        return float(found)

    def texts(self, key: str) -> list[str]:
        """A list of strings of the metadata."""
        return list(self._value(key, list, None))

    def of_model(self, key: str) -> str:
        """The full name of a key that belongs to the architecture."""
        return f"{self.architecture}.{key}"

    def _value(self, key: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        if key not in self.metadata:
            if default is None and kinds is not str:
                raise ConversionError(f"{self.path} has no {key} in its metadata; it is no complete model")
            return default
        found = self.metadata[key]
        if not isinstance(found, kinds):
            raise ConversionError(f"{self.path}: {key} is of the wrong kind ({type(found).__name__})")
        return found


class _Cursor:
    """Reads on from a place in the file; asking for more than the file has is a ConversionError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def take(self, length: int) -> bytes:
        start = self.place
        if length > len(self.data) - start:
            raise ConversionError(
                f"{self.path} is cut short or damaged: at byte {start} it announces {length} more bytes, but ends at {len(self.data)}; "
                "download it again"
            )
        self.place += length
        return self.data[start : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        start = self.place
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"{self.path} is damaged: the text at byte {start} is not UTF-8") from error

    def name(self) -> str:
        """A text that is shown to people, so it may hold nothing that moves their cursor."""
        if not (found := self.text()).isprintable():
            raise ConversionError(f"{self.path} is damaged: the name {found[:100]!r} has characters that cannot be printed")
        return found

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                # Every string takes 8 bytes at least, so a huge count ends at the end of the file.
                return [self.text() for _ in range(count)]
            if kind in _NUMBERS:
                dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        raise ConversionError(f"{self.path} is damaged: a metadata value at byte {self.place} has type {kind}, which does not exist")


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file.

    Raises ConversionError if it is no GGUF file, of a version that is not read, cut short, or contradicts itself; or if the package gguf,
    which knows the types of tensors, is missing.
    """
    if not path.is_file():
        raise ConversionError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give a .gguf file")
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty; download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data)
        if data[:4] != b"GGUF":
            raise ConversionError(
                f"{path} is no GGUF file: it begins with {bytes(data[:4])!r}, not b'GGUF'; give a .gguf file, or another model's folder"
            )
        cursor.take(4)
        if (version := cursor.number("I")) not in _VERSIONS:
            raise ConversionError(f"{path} has version {version} of the format, or is big-endian; versions 2 and 3 are read, little-endian")
        num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.name()
            if key in metadata:
                raise ConversionError(f"{path} is damaged: its metadata has {key} twice")
            kind = cursor.number("I")
            metadata[key] = cursor.name() if kind == _STRING and key in _SHOWN else cursor.value(kind)
        found = GgufFile(path, metadata, _tensors(cursor, num_tensors, metadata.get("general.alignment", 32)))
    if not found.text("general.architecture"):
        raise ConversionError(f"{path} does not name its architecture (general.architecture); it is no complete model")
    return found


def _tensors(cursor: _Cursor, count: int, alignment: object) -> dict[str, GgufTensor]:
    """The table of tensors, with places in the file."""
    path = cursor.path
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ConversionError(f"{path} is damaged: general.alignment is {alignment!r}, not a power of two")
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.name(), cursor.number("I")
        if name in table or not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ConversionError(f"{path} is damaged: tensor {name} has {dimensions} dimensions, or is there twice")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))))
        table[name] = shape, cursor.number("I"), cursor.number("Q")
    begin, size = -(-cursor.place // alignment) * alignment, len(cursor.data)
    tensors = {}
    for name, (shape, type_id, offset) in table.items():
        nbytes = _stored_bytes(path, name, shape, type_id)
        if offset % alignment or begin + offset + nbytes > size:
            raise ConversionError(
                f"{path} is cut short or damaged: tensor {name} {list(shape)} would end at byte {begin + offset + nbytes}, "
                f"but the file has {size}; download it again"
            )
        tensors[name] = GgufTensor(name, shape, type_id, begin + offset, nbytes)
    return tensors


def _stored_bytes(path: Path, name: str, shape: Sequence[int], type_id: int) -> int:
    """Bytes that a tensor takes in the file."""
    gguf = package()
    if type_id not in {int(kind) for kind in gguf.GGML_QUANT_SIZES}:
        raise ConversionError(f"{path}: tensor {name} has type {type_id}, which the package gguf does not know")
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    if 0 in shape or shape[-1] % block:
        raise ConversionError(f"{path} is damaged: tensor {name} has shape {list(shape)}, whose rows are not whole blocks of {block}")
    return int(math.prod(shape) // block * nbytes)


def type_name(tensor: GgufTensor) -> str:
    """Such as Q4_1."""
    return str(package().GGMLQuantizationType(tensor.type_id).name)


def dequantised(file: GgufFile, tensor: GgufTensor) -> np.ndarray:
    """The tensor's values, by the package gguf itself. [shape], float32"""
    gguf = package()
    kind = gguf.GGMLQuantizationType(tensor.type_id)
    stored = np.memmap(file.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
    numbers = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
    if numbers is not None:
        return np.asarray(stored.view(numbers), np.float32).reshape(tensor.shape)
    try:
        return np.asarray(gguf.dequantize(stored.reshape(*tensor.shape[:-1], -1), kind), np.float32).reshape(tensor.shape)
    except NotImplementedError as error:
        raise ConversionError(f"{file.path}: tensor {tensor.name} has type {kind.name}, which the package gguf does not unpack") from error


def package() -> Any:
    """The package gguf. Raises ConversionError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ConversionError(f"GGUF files need the packages gguf and accelerate, and {error.name} is missing; {EXTRA}") from error
    return gguf
