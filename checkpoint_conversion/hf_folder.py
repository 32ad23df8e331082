"""Read and write Hugging Face folders one tensor at a time: safetensors in one file, or in shards with an index.

folder --HfReader--> name, tensor            units --write_hf--> shards, index, config and tokenizer of the source
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint_conversion.folders import WEIGHT_SUFFIXES, complete_file, copy_config
from checkpoint_conversion.rules import ConversionError
from checkpoint_conversion.units import MAX_SHARD_BYTES, Reader, TensorInfo, Unit, shards

HF_INDEX = "model.safetensors.index.json"

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
# Elements cast and written at a time, so that another dtype needs no second copy of a tensor.
_PIECE = 2**24


class HfReader(Reader):
    """The tensors of an HF folder (one safetensors file, or shards with an index), read one by one.

    Opening reads every file's header, so that a missing shard, a truncated file, or an index that does not match its files is a
    ConversionError before the first tensor is converted. Files are memory-mapped.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self._index()
        self._files = {file: self._open(file) for file in sorted(set(index.values()))}
        held = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118 (not a dict)
        problems = [f"{name}: not in {file}, although the index says so" for name, file in sorted(index.items()) if held.get(name) != file]
        problems += [f"{name}: in {file}, but not in the index" for name, file in sorted(held.items()) if name not in index]
        if problems:
            raise ConversionError(f"{self.folder / HF_INDEX} does not match its files; download again:\n  " + "\n  ".join(problems))
        self._file_of = index

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def paths(self) -> list[Path]:
        """The files that hold tensors, and the index if there is one."""
        index = self.folder / HF_INDEX
        return [*(self.folder / file for file in self._files), *([index] if index.is_file() else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        found = self._handle(name).get_slice(name).get_dtype()
        if found.startswith(("F8", "F4", "F6")):
            raise ConversionError(f"{name} in {self.folder} has dtype {found}: quantized weights; convert the unquantized model")
        if found not in _TORCH_DTYPES:
            raise ConversionError(f"{name} in {self.folder} has dtype {found}; supported are {', '.join(_TORCH_DTYPES)}")
        return _TORCH_DTYPES[found]

    def get(self, name: str) -> Tensor:
        """The tensor, on CPU."""
        return self._handle(name).get_tensor(name)

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
                weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConversionError(f"{path} is not an index of safetensors files ({error!r}); download it again") from error
            if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
                raise ConversionError(f"{path}: weight_map does not give the file of each tensor; download it again")
            return weight_map
        single = self.folder / "model.safetensors"
        if single.is_file():
            return dict.fromkeys(self._open(single.name).keys(), single.name)
        if (self.folder / "adapter_config.json").is_file() or any(self.folder.glob("adapter_model.*")):
            raise ConversionError(
                f"{self.folder} holds an adapter (LoRA), not a model; merge it into its base model (peft's merge_and_unload) and save that"
            )
        others = sorted(path.name for path in self.folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
        raise ConversionError(
            f"{self.folder} holds neither model.safetensors nor {HF_INDEX}"
            + (f", but {', '.join(others[:3])}; save the model as safetensors with its shards under their index" if others else "")
        )


def write_hf(
    folder: Path,
    units: Sequence[Unit],
    *,
    source: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write the units' tensors (cast to `dtype` where given) as safetensors shards beside `source`'s config and tokenizer.

    One tensor is in memory at a time. Shards that are there already are those of an interrupted call and are kept: give the folder of
    `new_folder`. config.json is copied unchanged, except that its dtype follows `dtype`. `on_bytes` gets the progress, in source bytes.
    """
    copy_config(source, folder)
    if dtype is not None:
        _set_dtype(folder / "config.json", dtype)
    weight_map: dict[str, str] = {}
    total = 0
    files = shards(units, max_shard_bytes)
    for number, file in enumerate(files, start=1):
        path = folder / ("model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        infos = [replace(info, dtype=dtype or info.dtype) for unit in file for info in unit.tensors]
        weight_map |= {info.name: path.name for info in infos}
        total += sum(info.nbytes for info in infos)
        if path.is_file():
            on_bytes(sum(unit.nbytes for unit in file))
        else:
            _write_shard(path, file, infos, on_bytes)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with complete_file(folder / HF_INDEX) as stream:
            stream.write((json.dumps(index, indent=2) + "\n").encode())


def _write_shard(path: Path, units: Sequence[Unit], infos: Sequence[TensorInfo], on_bytes: Callable[[int], None]) -> None:
    """One safetensors file: length of the header, header, tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        if info.dtype not in _DTYPES:
            raise ConversionError(f"{info.name} has dtype {info.dtype}; safetensors folders here hold {', '.join(map(str, _DTYPES))}")
        header[info.name] = {"dtype": _DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)  # tensors begin at a multiple of 8, as safetensors aligns them
    left = iter(infos)
    with complete_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for unit in units:
            tensors = list(unit.make())
            while tensors:
                tensor, info = tensors.pop(0), next(left)
                assert tuple(tensor.shape) == info.shape, f"{info.name} became {list(tensor.shape)}, planned {list(info.shape)}"
                flat = tensor.detach().contiguous().reshape(-1)
                del tensor
                for piece in flat.split(_PIECE):
                    file.write(raw_bytes(piece.to(device="cpu", dtype=info.dtype)))
            on_bytes(unit.nbytes)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies in one piece on the CPU; for files, checksums and bit comparison."""
    tensor = tensor.detach().cpu().contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
