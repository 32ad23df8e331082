"""Read and write Megatron-Core's `torch_dist` checkpoints one tensor at a time, without a process group, a launcher or a GPU.

folder --MegatronReader--> name, tensor            units --write_megatron--> folder that loads at any parallel layout

The format is torch's distributed checkpoint (tensors one after the other in *.distcp, one index in .metadata) with Megatron's keys: a
layer's tensors are stored under one key for all layers, with the layer as an extra first axis (and the expert as a second), and under
the names of TransformerEngine's layers. So torch alone reads and writes it here, tensor by tensor, where Megatron's own `save` wants
the whole model in memory and a running process group.

`.metadata` is a pickle, as torch writes it. Only the classes of the format are built from it, so it runs no code.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

# The index of every torch_dist checkpoint pickles this class by this name: it is part of the format in spite of its underscore.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_conversion.architectures import local_name
from checkpoint_conversion.folders import complete_file
from checkpoint_conversion.hf_folder import raw_bytes
from checkpoint_conversion.rules import ConversionError, Rule
from checkpoint_conversion.torch_file import append_archive, load_index, map_file, map_tensor
from checkpoint_conversion.units import MAX_SHARD_BYTES, Reader, Unit, shards

_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_KEY = re.compile(r"(.+\.experts)\.local_experts\.(\d+)\.(.+)")
_STORED_EXPERT = ".experts.experts."
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
# Megatron's local linear layers store an empty object each and expect it when loading, because TransformerEngine keeps fp8 state there.
_LINEAR_WEIGHT = re.compile(r"(decoder\.layers\..*linear_(?:qkv|proj|fc1|fc2)\.)weight")
_ALIGNMENT = 64
"""torch.save aligns tensors to this inside its archives. If each archive begins at a multiple too, tensors can be used in place."""

_DAMAGED_PICKLE = (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored."""

    key: str
    index: tuple[int, ...] = ()
    """Along the first axes of what is stored under the key: layer, then expert; empty outside the layers."""


def place_of(rule: Rule) -> Place:
    """Where Megatron stores the tensor of a rule."""
    expert = _EXPERT_KEY.fullmatch(rule.megatron_name)
    name = f"{expert[1]}.experts.{expert[3]}" if expert else rule.te_name
    layer = _LAYER_KEY.fullmatch(name)
    if layer is None:
        return Place(name)
    return Place(f"decoder.layers.{layer[2]}", (int(layer[1]), *([int(expert[2])] if expert else [])))


class MegatronReader(Reader):
    """The model's tensors in a `torch_dist` checkpoint, complete for any parallel layout that saved it, read one by one.

    Optimizer, scheduler and RNG entries beside them are left alone. Names are global local-layer names. Opening checks that every
    file is there and as long as the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ".metadata").is_file():
            raise ConversionError(f"{self.folder} is no Megatron dist_checkpointing folder of format torch_dist: it holds no .metadata")
        try:
            self._metadata: Metadata = load_index(self.folder / ".metadata")
            if not isinstance(self._metadata, Metadata):
                raise TypeError(f"it holds a {type(self._metadata).__name__}")
        except _DAMAGED_PICKLE as error:
            raise ConversionError(f"{self.folder / '.metadata'} is damaged ({error}); copy the checkpoint again") from error
        self._place = dict(self._places())
        self._contents: dict[str, Tensor] = {}
        self._check_files()

    def names(self) -> list[str]:
        """Global names of all tensors of the model, in the order stored."""
        return list(self._place)

    def other_keys(self) -> list[str]:
        """Keys stored beside the model: optimizer state, RNG state and the like."""
        return [key for key in self._metadata.state_dict_metadata if not key.startswith(_MODEL_KEYS)]

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place[name]
        return tuple(self._entry(place).size[len(place.index) :])

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(self._place[name]).properties.dtype

    def get(self, name: str) -> Tensor:
        """The full tensor (as at tensor parallel 1, vocabulary padded), put together from all shards."""
        place = self._place[name]
        shape, axes = self.shape(name), len(place.index)
        target: Tensor | None = None
        covered = 0
        for chunk in self._entry(place).chunks:
            within = tuple(index - first for index, first in zip(place.index, chunk.offsets, strict=False))
            if not all(0 <= index < size for index, size in zip(within, chunk.sizes, strict=False)):
                continue
            part = self._load(place.key, chunk)[within]
            covered += part.numel()
            if tuple(part.shape) == shape:
                target = part
                continue
            target = torch.empty(shape, dtype=part.dtype) if target is None else target
            window = tuple(slice(first, first + size) for first, size in zip(chunk.offsets[axes:], part.shape, strict=True))
            target[window] = part
        elements = torch.Size(shape).numel()
        if target is None or covered != elements:
            raise ConversionError(f"{name} in {self.folder}: its shards hold {covered} of {elements} elements; the save is incomplete")
        return target

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info: _StorageInfo = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        try:
            with (self.folder / info.relative_path).open("rb") as file:
                tensor = map_tensor(file, self._content(info.relative_path), info.offset, info.length)
        except ValueError as error:
            raise ConversionError(f"{self.folder / info.relative_path} is damaged at {key} ({error}); copy the checkpoint again") from error
        if tuple(tensor.shape) != tuple(chunk.sizes):
            raise ConversionError(f"{key} in {self.folder} is {list(tensor.shape)}, but the index says {list(chunk.sizes)}")
        return tensor

    def _content(self, file: str) -> Tensor:
        if file not in self._contents:  # one mapping for all tensors of a file: the system limits their number
            self._contents[file] = map_file(self.folder / file)
        return self._contents[file]

    def _places(self) -> Iterator[tuple[str, Place]]:
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or not key.startswith(_MODEL_KEYS):
                continue
            rest = key.removeprefix("decoder.layers.")
            layers: list[tuple[str, tuple[int, ...]]] = [(key, ())]
            if rest != key and not _LAYER_KEY.fullmatch(key):  # else outside the layers, or one key per layer ("non-homogeneous")
                layers = [(f"decoder.layers.{layer}.{rest}", (layer,)) for layer in range(entry.size[0])]
            for name, index in layers:
                if _STORED_EXPERT not in name:
                    yield local_name(name), Place(key, index)
                    continue
                for expert in range(entry.size[len(index)]):
                    yield name.replace(_STORED_EXPERT, f".experts.local_experts.{expert}."), Place(key, (*index, expert))

    def _entry(self, place: Place) -> TensorStorageMetadata:
        return self._metadata.state_dict_metadata[place.key]

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            if index.fqn.startswith(_MODEL_KEYS):
                needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        for file, size in sorted(needed.items()):
            path = self.folder / file
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise ConversionError(f"{path} is missing, but the checkpoint's index names it; copy the checkpoint again")
            if found < size:
                raise ConversionError(f"{path} has {found} bytes, but the checkpoint's index expects {size}; copy the checkpoint again")


def write_megatron(
    folder: Path, units: Sequence[Unit], *, max_shard_bytes: int = MAX_SHARD_BYTES, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Write the units' full tensors as a checkpoint that a GPTModel of any parallel layout loads.

    One tensor is in memory at a time. Files that are there already are those of an interrupted call and are kept: give (a part of)
    the folder of `new_folder`. The index is written last. `on_bytes` gets the progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, places = _index_of(units), {unit.rule.megatron_name: place_of(unit.rule) for unit in units}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    files = shards(units, max_shard_bytes)
    for number, file in enumerate(files):
        path = folder / f"__0_{number}.distcp"
        spans = folder / f"{path.name}.spans.json"
        if not path.is_file():
            _write_units(path, spans, file, places, on_bytes)
        else:
            on_bytes(sum(unit.nbytes for unit in file))
        for unit, (start, length) in zip(file, json.loads(spans.read_text(encoding="utf-8")), strict=True):
            place = places[unit.rule.megatron_name]
            offsets = torch.Size([*place.index, *[0] * len(unit.tensors[0].shape)])
            stored[MetadataIndex(place.key, offsets)] = _StorageInfo(path.name, start, length)
    stored |= _write_extra_state(folder / f"__0_{len(files)}.distcp", places.values(), entries)
    content = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    with complete_file(folder / "common.pt") as stream:
        append_archive(stream, {"content_metadata": content})
    with complete_file(folder / "metadata.json") as stream:
        stream.write(json.dumps(formats).encode())
    with complete_file(folder / ".metadata") as stream:
        stream.write(pickle.dumps(Metadata(entries, storage_data=stored, version="1.0.0")))
    for spans in folder.glob("*.spans.json"):
        spans.unlink()


def _index_of(units: Sequence[Unit]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """The entry of each key. Raises ConversionError where layers or experts that share a key differ in dtype or shape."""
    sizes: dict[str, tuple[int, ...]] = {}
    for unit in units:
        place = place_of(unit.rule)
        known = sizes.get(place.key, (0,) * len(place.index))
        sizes[place.key] = tuple(max(size, index + 1) for size, index in zip(known, place.index, strict=True))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for unit in units:
        place, (info,) = place_of(unit.rule), unit.tensors
        size = torch.Size([*sizes[place.key], *info.shape])
        entry = entries.setdefault(place.key, TensorStorageMetadata(TensorProperties(dtype=info.dtype), size, []))
        assert isinstance(entry, TensorStorageMetadata)
        if entry.size != size or entry.properties.dtype != info.dtype:
            raise ConversionError(
                f"{info.name} is {info.dtype} {list(info.shape)}, but the layers before it {entry.properties.dtype} "
                f"{list(entry.size[len(place.index) :])}; Megatron stores all layers in one tensor"
            )
        offsets = torch.Size([*place.index, *[0] * len(info.shape)])
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size([*[1] * len(place.index), *info.shape])))
    return entries


def _write_units(path: Path, spans: Path, units: Sequence[Unit], places: dict[str, Place], on_bytes: Callable[[int], None]) -> None:
    """One file of tensors, and beside it the start and length of each, which are known only after writing."""
    found = []
    with complete_file(path) as file:
        for unit in units:
            (tensor,), (info,) = unit.make(), unit.tensors
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), f"{info.name} is not what was planned"
            index = places[info.name].index
            found.append(_append(file, _compact(tensor.detach().cpu().reshape([1] * len(index) + list(tensor.shape)))))
            del tensor
            on_bytes(unit.nbytes)
        with complete_file(spans) as beside:  # before the file gets its name, so that it never exists without them
            beside.write(json.dumps(found).encode())


def _write_extra_state(path: Path, places: Any, entries: dict[str, Any]) -> dict[MetadataIndex, _StorageInfo]:
    stored = {}
    with complete_file(path) as file:
        for place in places:
            if linear := _LINEAR_WEIGHT.fullmatch(place.key):
                sizes = entries[place.key].size[: len(place.index)]
                key = f"{linear[1]}_extra_state/shard_{'.'.join(map(str, place.index))}_{'.'.join(map(str, sizes))}"
                entries[key] = BytesStorageMetadata()
                stored[MetadataIndex(key)] = _StorageInfo(path.name, *_append(file, [None]))
    return stored


def _append(file: BinaryIO, content: Any) -> tuple[int, int]:
    """Save one object at the end of the file; (where it begins, its length)."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
    start = file.tell()
    # Nothing compares these checksums when loading, and they cost more time than writing.
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        append_archive(file, content)
    finally:
        torch.serialization.set_crc32_options(checksums)
    return start, file.tell() - start


def _compact(tensor: Tensor) -> Tensor:
    """The tensor with a storage of exactly its size, because saving a view saves all of its storage."""
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes or not tensor.numel():
        return tensor
    # A buffer over the same bytes has a storage of its own; a memory-mapped tensor is not copied.
    return torch.frombuffer(raw_bytes(tensor), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
