"""Read and write model folders one tensor at a time: Hugging Face safetensors and Megatron-Core `torch_dist` checkpoints.

HF folder       --HfReader------> name, tensor --write_hf-------> HF folder
Megatron folder --MegatronReader> name, tensor --write_megatron-> Megatron folder

No process group, no launcher, no GPU. A `torch_dist` checkpoint is torch's distributed-checkpoint format (tensors one behind the
other in *.distcp, one index in .metadata) with Megatron's keys: a layer's tensors are stored under one key for all layers, with the
layer as an extra first axis, and under the names of TransformerEngine's layers. So torch alone reads and writes it here, tensor by
tensor, where Megatron's own `save` wants the whole model in memory and a running process group.

Nothing here leaves a half-written folder behind: `new_folder` writes beside the target and renames when all is there.
`.metadata` is a pickle, as torch writes it: read only checkpoints that you trust.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

# The index of every torch_dist checkpoint pickles this class by this name: it is part of the format, whatever its underscore says.
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from checkpoint_conversion.architectures import local_name, te_name
from checkpoint_conversion.rules import ConversionError

HF_INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


# ---- folders


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well and vanishes when it raises."""
    if folder.exists():
        raise ConversionError(f"{folder} exists already; choose another folder or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_config(source: Path, target: Path) -> None:
    """Copy what travels with a model's weights unchanged: config, generation config, tokenizer, chat templates, licence."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weight and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


# ---- Hugging Face


class HfReader:
    """The tensors of an HF folder (one safetensors file, or shards with an index), read one by one.

    Opening reads every file's header, so that a missing shard, a truncated file, or an index that names what its files do not
    hold is a ConversionError before the first tensor is converted. Files are memory-mapped.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self._index()
        self._files = {file: self._open(file) for file in sorted(set(index.values()))}
        held = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118 (not a dict)
        problems = [f"{name}: not in {file}, where the index says" for name, file in sorted(index.items()) if held.get(name) != file]
        problems += [f"{name}: in {file}, but not in the index" for name, file in sorted(held.items()) if name not in index]
        if problems:
            raise ConversionError(f"{self.folder / HF_INDEX} does not match its files; download again:\n  " + "\n  ".join(problems))
        self._file_of = index

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        found = self._slice(name).get_dtype()
        if found not in _TORCH_DTYPES:
            raise ConversionError(f"{name} in {self.folder} has dtype {found}; supported are {', '.join(_TORCH_DTYPES)}")
        return _TORCH_DTYPES[found]

    def nbytes(self, name: str) -> int:
        return _nbytes(self.shape(name), self.dtype(name))

    def get(self, name: str) -> Tensor:
        """The tensor, on CPU."""
        return self._handle(name).get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _handle(self, name: str) -> Any:
        if name not in self._file_of:
            raise ConversionError(f"{self.folder} holds no tensor {name}")
        return self._files[self._file_of[name]]

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise ConversionError(f"{path} is missing, but {HF_INDEX} names it; download it")
        try:
            return safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ConversionError(f"{path} is not a complete safetensors file ({error}); download it again") from error

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if not self.folder.is_dir():
            raise ConversionError(f"model folder {self.folder} does not exist; give a folder with config.json and *.safetensors")
        path = self.folder / HF_INDEX
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
            except (json.JSONDecodeError, KeyError) as error:
                raise ConversionError(f"{path} is not an index of safetensors files: {error!r}") from error
        single = self.folder / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        others = sorted(path.name for path in self.folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
        raise ConversionError(
            f"{self.folder} holds neither model.safetensors nor {HF_INDEX}"
            + (f", but {', '.join(others[:3])}; save the model as safetensors with its shards under their index" if others else "")
        )


class _SafetensorsFile:
    """One safetensors file, written tensor by tensor: room for the header is left in front and filled in at the end.

    The format allows a header to end in spaces, which is what makes this possible without knowing the tensors in advance.
    """

    HEADER_BYTES = 2**17 - 8

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.data_bytes = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 64
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self.HEADER_BYTES)

    def has_room_for(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether the tensor fits; an empty file takes a tensor of any size."""
        fits = self.data_bytes + tensor.nbytes <= max_bytes and self._header_bytes + self._entry_bytes(name, tensor) <= self.HEADER_BYTES
        return not self.names or fits

    def add(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in _DTYPES:
            raise ConversionError(f"{name} has dtype {tensor.dtype}; safetensors folders here hold {', '.join(map(str, _DTYPES))}")
        end = self.data_bytes + tensor.nbytes
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.data_bytes, end]}
        self._header_bytes += self._entry_bytes(name, tensor)
        self._file.write(_raw(tensor))
        self.names.append(name)
        self.data_bytes = end

    def close(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(header) <= self.HEADER_BYTES, f"the header of {self.path} takes {len(header)} bytes"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.HEADER_BYTES) + header.ljust(self.HEADER_BYTES))
        self._file.close()

    @staticmethod
    def _entry_bytes(name: str, tensor: Tensor) -> int:
        return 2 * len(name.encode()) + 24 * tensor.ndim + 128


def write_hf(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write an HF folder: the tensors (cast to `dtype` where given) in safetensors shards, and `source`'s config and tokenizer.

    Takes the tensors one at a time. The folder appears when it is complete; one that exists already is a ConversionError.
    config.json travels unchanged, except that its dtype follows `dtype`.
    """
    with new_folder(Path(folder)) as partial:
        copy_config(Path(source), partial)
        if dtype is not None:
            _set_dtype(partial / "config.json", dtype)
        files: list[_SafetensorsFile] = []
        for name, tensor in tensors:
            tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            if not files or not files[-1].has_room_for(name, tensor, max_shard_bytes):
                if files:
                    files[-1].close()
                files.append(_SafetensorsFile(partial / f"{len(files)}.safetensors"))
            files[-1].add(name, tensor)
        if not files:
            raise ConversionError(f"there is no tensor to write to {folder}")
        files[-1].close()
        if len(files) == 1:
            files[0].path.rename(partial / "model.safetensors")
            return
        weight_map = {}
        for number, file in enumerate(files, start=1):
            path = partial / f"model-{number:05d}-of-{len(files):05d}.safetensors"
            file.path.rename(path)
            weight_map.update(dict.fromkeys(file.names, path.name))
        index = {"metadata": {"total_size": sum(file.data_bytes for file in files)}, "weight_map": weight_map}
        (partial / HF_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- Megatron-Core

_LAYER_KEY = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
# Megatron's local linear layers store an empty object each and miss it on load, because TransformerEngine keeps fp8 state there.
_EXTRA_STATE_MODULES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def stored_key(name: str) -> tuple[str, int | None]:
    """Where Megatron stores the tensor with this global name: (key, index along the layer axis; None outside the layers)."""
    match = _LAYER_KEY.fullmatch(te_name(name))
    return (name, None) if match is None else (f"decoder.layers.{match[2]}", int(match[1]))


class MegatronReader:
    """The model's tensors in a Megatron-Core `torch_dist` checkpoint, whole whatever parallel layout saved it, read one by one.

    Optimizer, scheduler and RNG entries beside them are left alone. Names are global local-layer names. Opening checks that every
    file is there and as long as the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / ".metadata").is_file():
            raise ConversionError(f"{self.folder} is no Megatron dist_checkpointing folder of format torch_dist: it holds no .metadata")
        self._reader = FileSystemReader(self.folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ConversionError(f"{self.folder / '.metadata'} is damaged ({error}); copy the checkpoint again") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._place = dict(self._places())
        self._check_files()

    def names(self) -> list[str]:
        """Global names of all tensors of the model, in the order stored."""
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        key, layer = self._find(name)
        size = tuple(self._entry(key).size)
        return size if layer is None else size[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(self._find(name)[0]).properties.dtype

    def nbytes(self, name: str) -> int:
        return _nbytes(self.shape(name), self.dtype(name))

    def get(self, name: str) -> Tensor:
        """The full tensor (as at tensor parallel 1, vocabulary padded), put together from all shards."""
        key, layer = self._find(name)
        entry = self._entry(key)
        items, covered = [], 0
        for chunk in entry.chunks:
            offsets, sizes, skip = list(chunk.offsets), list(chunk.sizes), [0] * len(chunk.sizes)
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                skip[0], offsets[0], sizes[0] = layer - offsets[0], 0, 1
            covered += torch.Size(sizes).numel()
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=torch.Size(offsets),
                    storage_index=MetadataIndex(key, chunk.offsets),
                    storage_offsets=torch.Size(skip),
                    lengths=torch.Size(sizes),
                )
            )
        shape = self.shape(name)
        target = torch.empty(shape if layer is None else (1, *shape), dtype=entry.properties.dtype)
        if covered != target.numel():
            raise ConversionError(
                f"{name} in {self.folder}: its shards hold {covered} of {target.numel()} elements; the save is incomplete"
            )
        planner = DefaultLoadPlanner()
        planner.set_up_planner({key: target}, self._metadata, is_coordinator=True)
        self._reader.read_data(LoadPlan(items), planner).wait()
        return target if layer is None else target[0]

    def _places(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or not key.startswith(_MODEL_KEYS):
                continue
            rest = key.removeprefix("decoder.layers.")
            if rest == key or _LAYER_KEY.fullmatch(key):
                # Outside the layers, or saved with one key per layer (Megatron's non-homogeneous layout).
                yield local_name(key), (key, None)
            else:
                for layer in range(entry.size[0]):
                    yield local_name(f"decoder.layers.{layer}.{rest}"), (key, layer)

    def _find(self, name: str) -> tuple[str, int | None]:
        if name not in self._place:
            raise ConversionError(f"{self.folder} holds no tensor {name}")
        return self._place[name]

    def _entry(self, key: str) -> TensorStorageMetadata:
        return self._metadata.state_dict_metadata[key]

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


def write_megatron(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, num_layers: int, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write full tensors with global names as a `torch_dist` checkpoint that a GPTModel of any parallel layout loads.

    Takes the tensors one at a time and writes each as one shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with _ShardedFile(folder, max_shard_bytes) as file:
        for name, tensor in tensors:
            key, layer = stored_key(name)
            axis = [] if layer is None else [layer]
            stored = tensor.detach().cpu().reshape([1] * len(axis) + list(tensor.shape))
            offsets = torch.Size(axis + [0] * tensor.ndim)
            size = torch.Size([num_layers] * len(axis) + list(tensor.shape))
            entry = entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, []))
            assert isinstance(entry, TensorStorageMetadata)
            if entry.size != size or entry.properties.dtype != tensor.dtype:
                raise ConversionError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, but the layers before it {entry.properties.dtype} "
                    f"{list(entry.size[1:])}; Megatron stores all layers in one tensor"
                )
            entry.chunks.append(ChunkStorageMetadata(offsets, stored.shape))
            places[MetadataIndex(key, offsets)] = file.save(_compact(stored))
        for module in _EXTRA_STATE_MODULES:
            for layer in range(num_layers):
                key = f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
                entries[key] = BytesStorageMetadata()
                places[MetadataIndex(key)] = file.save([None])
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=places, version="1.0.0")))
    content = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    torch.save({"content_metadata": content}, folder / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(formats), encoding="utf-8")


class _ShardedFile:
    """The *.distcp files of a checkpoint as one stream: a new file begins when the last has grown past `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes, self.count = folder, max_bytes, 0
        self.stream: BinaryIO | None = None

    def __enter__(self) -> _ShardedFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self.stream.close()

    def save(self, content: Any) -> _StorageInfo:
        """Append one object; returns where it lies."""
        if self.stream is None or self.stream.tell() >= self.max_bytes:
            self.__exit__()
            self.stream = (self.folder / f"__0_{self.count}.distcp").open("wb")
            self.count += 1
        start = self.stream.tell()
        torch.save(content, _Tail(self.stream))
        return _StorageInfo(Path(self.stream.name).name, start, self.stream.tell() - start)


class _Tail(io.RawIOBase):
    """The end of an open file as a stream of its own, because torch.save writes offsets from the start of its stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._stream.write(data)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor with a storage of just its size: saving a view saves all of the storage it looks into."""
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()
    return tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, for checksums and bit comparison."""
    return _raw(tensor.detach().cpu().contiguous())
