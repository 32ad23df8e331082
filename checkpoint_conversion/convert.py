"""Convert a model folder offline, without a GPU or a launcher: `hf-to-megatron`, `megatron-to-hf`, `verify`, `inspect`.

A converted folder, and each checkpoint of a training run, is laid out alike:

    model/          Megatron dist_checkpointing (torch_dist); loads at any tensor, pipeline, expert and data parallel size
                    (or, where asked for, the classic layout with one file per rank)
    hf/             config.json, tokenizer and chat template of the Hugging Face model, unchanged
    metadata.json   {"format": "igpo-megatron", "model_type": ..., "vocab_multiple": ...}
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from checkpoint_conversion.architectures import check_sizes, check_total, read_shape, rules_for
from checkpoint_conversion.classic_folder import TRACKER, ClassicReader, Grid, check_grid, is_classic, total_bytes, write_classic
from checkpoint_conversion.folders import copy_config, describe, new_folder
from checkpoint_conversion.hf_folder import HfReader, raw_bytes, write_hf
from checkpoint_conversion.rules import ConversionError, Rule
from checkpoint_conversion.torch_dist_folder import MegatronReader, write_megatron
from checkpoint_conversion.units import MAX_SHARD_BYTES, to_hf, to_megatron

FORMAT = "igpo-megatron"
VOCAB_MULTIPLE = 128
"""Megatron's customary padding of the vocabulary. A model with other padding loads the checkpoint as well."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hf_to_megatron(
    hf: str | Path,
    out: str | Path,
    *,
    vocab_multiple: int = VOCAB_MULTIPLE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    classic: Grid | None = None,
    te_names: bool = True,
) -> None:
    """Convert an HF folder to a Megatron folder of the layout above, bit by bit in the dtype it has.

    `classic`: write one file per rank of that grid instead, for TransformerEngine's layers or (`te_names` false) Megatron's local ones.
    Raises ConversionError if `hf` is incomplete or unsupported, or `out` exists. `out` appears when it is complete; a call that was
    interrupted is resumed by giving it again.
    """
    hf, out = Path(hf), Path(out)
    shape = read_shape(hf)
    rules = rules_for(shape, vocab_multiple)
    reader = HfReader(hf)
    check_total(rules, hf_names=reader.names())
    check_sizes(rules, shape, {name: reader.shape(name) for name in reader.names()})
    _check_copy_of_embedding(reader, rules)
    if classic is not None:
        check_grid(shape, classic)
    units = to_megatron(rules, reader)
    job = {
        "to": "torch_dist" if classic is None else f"classic {asdict(classic)} {te_names}",
        "source": describe(hf, reader.paths()),
        "options": [vocab_multiple, max_shard_bytes],
    }
    total = sum(unit.nbytes for unit in units) if classic is None else total_bytes(units, rules, shape, classic)
    with new_folder(out, job) as partial, _progress("HF -> Megatron", total) as (bar, task):

        def on_bytes(count: int) -> None:
            bar.advance(task, count)

        if classic is None:
            write_megatron(partial / "model", units, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
        else:
            write_classic(partial / "model", units, rules, shape, classic, te_names=te_names, on_bytes=on_bytes)
        copy_config(hf, partial / "hf")
        write_metadata(partial, model_type=shape.model_type, vocab_multiple=vocab_multiple)


def megatron_to_hf(
    megatron: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    config: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Convert a Megatron folder of the layout above (also a training checkpoint) to an HF folder; `dtype` None keeps what is stored.

    A folder that Megatron itself wrote, torch_dist or classic, converts with `config`: an HF folder with the model's config.json and
    tokenizer. Raises ConversionError if `megatron` is incomplete or of another model than the config says, or `out` exists. `out` appears
    when it is complete; a call that was interrupted is resumed by giving it again.
    """
    out = Path(out)
    hf, weights = _find_megatron(Path(megatron), None if config is None else Path(config))
    rules, reader = _open_megatron(hf, weights)
    units = to_hf(rules, reader)
    check_sizes(rules, read_shape(hf), {info.name: info.shape for unit in units for info in unit.tensors})
    files = [path for path in weights.rglob("*") if path.is_file()]
    job = {"to": "hf", "source": describe(weights, files), "options": [str(dtype), str(hf.resolve()), max_shard_bytes]}
    total = sum(unit.nbytes for unit in units)
    with new_folder(out, job) as partial, _progress("Megatron -> HF", total) as (bar, task):
        write_hf(partial, units, source=hf, dtype=dtype, max_shard_bytes=max_shard_bytes, on_bytes=lambda count: bar.advance(task, count))


@dataclass(frozen=True)
class Verification:
    """How a Megatron folder compares with an HF folder, tensor by tensor."""

    num_tensors: int
    differences: dict[str, str]
    """HF name -> what differs (shape, dtype or values). Empty when the two are bit-equal."""

    worst: str
    """The HF name with the largest difference in value; any name when none differs."""

    worst_difference: float
    """max |HF - Megatron| over that tensor; inf where shapes differ, nan where a side is not a number."""

    hf_sha256: str
    """Over all names, dtypes, shapes and bytes, in the order of names."""

    megatron_sha256: str
    """The same of what the Megatron folder exports to."""


def verify(hf: str | Path, megatron: str | Path) -> Verification:
    """Compare names, shapes, dtypes and every bit. Names that are on one side only raise ConversionError with the list.

    This needs no model; igpo_megatron compares log-probs.
    """
    rules, reader = open_megatron(Path(megatron), Path(hf))
    source = HfReader(hf)
    check_total(rules, hf_names=source.names())
    differences: dict[str, str] = {}
    digests: dict[str, tuple[bytes, bytes]] = {}
    sizes: dict[str, float] = {}
    exporting = {name: rule for name, rule in rules.items() if rule.exports}
    with _progress("Verify", sum(reader.nbytes(name) for name in exporting)) as (bar, task):
        for name, rule in exporting.items():
            for hf_name, found in zip(rule.exports, rule.to_hf(reader.get(name)), strict=True):
                expected = source.get(hf_name)
                digests[hf_name] = _digest(hf_name, expected), _digest(hf_name, found)
                sizes[hf_name] = 0.0
                if digests[hf_name][0] != digests[hf_name][1]:
                    sizes[hf_name] = _difference(expected, found)
                    differences[hf_name] = (
                        f"HF {expected.dtype} {list(expected.shape)}, Megatron {found.dtype} {list(found.shape)}, "
                        f"largest difference {sizes[hf_name]:g}"
                    )
            bar.advance(task, reader.nbytes(name))
    # A difference that is not a number is worse than any number.
    worst = max(sorted(sizes), key=lambda hf_name: (sizes[hf_name] != sizes[hf_name], sizes[hf_name], hf_name in differences))
    hf_sha256, megatron_sha256 = (hashlib.sha256(b"".join(digests[name][side] for name in sorted(digests))).hexdigest() for side in (0, 1))
    return Verification(len(digests), differences, worst, sizes[worst], hf_sha256, megatron_sha256)


def open_megatron(folder: Path, config: Path) -> tuple[dict[str, Rule], MegatronReader | ClassicReader]:
    """The rules and the reader of a Megatron folder; `config` is an HF folder, for a Megatron folder that has none of its own."""
    return _open_megatron(*_find_megatron(folder, config))


def write_metadata(folder: Path, *, model_type: str, vocab_multiple: int) -> None:
    """Write metadata.json, which describes a Megatron folder, beside its model/ and hf/."""
    content = {"format": FORMAT, "version": 1, "model_type": model_type, "vocab_multiple": vocab_multiple}
    (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def find_weights(folder: Path) -> Path | None:
    """The folder of Megatron's files, in the layout above or in one that Megatron itself wrote; None if there is none."""
    for place in (folder / "model", folder):
        tracker = place / TRACKER
        if tracker.is_file():
            iteration = tracker.read_text(encoding="utf-8").strip()
            place = place / (f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration)
        if (place / ".metadata").is_file() or is_classic(place):
            return place
    return None


def _find_megatron(folder: Path, config: Path | None) -> tuple[Path, Path]:
    """(HF folder with the config, folder with Megatron's files); `config` is for folders that have none of their own."""
    if not folder.is_dir():
        raise ConversionError(f"Megatron folder {folder} does not exist")
    weights = find_weights(folder)
    if (folder / "hf").is_dir() and weights is not None:
        return folder / "hf", weights
    if weights is not None and config is not None:
        return config, weights
    hint = f"; give its parent {folder.parent}" if (folder.parent / "hf").is_dir() else ""
    if weights is not None and not hint:
        hint = "; name a Hugging Face folder with the model's config.json and tokenizer by --config"
    raise ConversionError(f"{folder} is not a checkpoint folder with model/ (Megatron) and hf/ (config and tokenizer) in it{hint}")


def _open_megatron(hf: Path, weights: Path) -> tuple[dict[str, Rule], MegatronReader | ClassicReader]:
    """The rules and the reader of Megatron's files, checked against each other."""
    shape = read_shape(hf)
    rules = rules_for(shape, VOCAB_MULTIPLE)
    reader = ClassicReader(weights, rules, shape) if is_classic(weights) else MegatronReader(weights)
    check_total(rules, megatron_names=reader.names())
    return rules, reader


def _check_copy_of_embedding(reader: HfReader, rules: Mapping[str, Rule]) -> None:
    """A tied model's folder may repeat the embedding as lm_head.weight. Raises ConversionError for anything else there."""
    if rules["output_layer.weight"].exports or "lm_head.weight" not in reader.names():
        return
    embedding = "model.embed_tokens.weight"
    if raw_bytes(reader.get("lm_head.weight")) != raw_bytes(reader.get(embedding)):
        raise ConversionError(
            f"{reader.folder}: config.json says tie_word_embeddings=true, but lm_head.weight differs from {embedding}; "
            "set tie_word_embeddings to false there if the model was trained with an output layer of its own"
        )


def _digest(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(raw_bytes(tensor))
    return digest.digest()


def _difference(expected: Tensor, found: Tensor) -> float:
    """max |expected - found|, piece by piece, so that a large embedding needs no third copy."""
    if expected.shape != found.shape:
        return float("inf")
    pieces = zip(expected.reshape(-1).split(2**22), found.reshape(-1).split(2**22), strict=True)
    return torch.stack([(a.double() - b.double()).abs().max() for a, b in pieces]).max().item()


@contextmanager
def _progress(title: str, total_bytes: int) -> Iterator[tuple[Progress, TaskID]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        yield bar, bar.add_task(title, total=total_bytes)
