"""Convert a model folder offline, without a GPU or a launcher: `hf-to-megatron`, `megatron-to-hf`, `verify`.

A converted folder, and each checkpoint of a training run, is laid out alike:

    model/          Megatron dist_checkpointing (torch_dist); loads at any tensor, pipeline and data parallel size
    hf/             config.json, tokenizer and chat template of the Hugging Face model, unchanged
    metadata.json   {"format": "igpo-megatron", "model_type": ..., "vocab_multiple": ...}
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from checkpoint_conversion.architectures import check_total, read_shape, rules_for
from checkpoint_conversion.rules import ConversionError, Rule
from checkpoint_conversion.streams import (
    MAX_SHARD_BYTES,
    HfReader,
    MegatronReader,
    copy_config,
    new_folder,
    raw_bytes,
    write_hf,
    write_megatron,
)

FORMAT = "igpo-megatron"
VOCAB_MULTIPLE = 128
"""Megatron's customary padding of the vocabulary. A model padded otherwise loads the checkpoint all the same."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hf_to_megatron(
    hf: str | Path, out: str | Path, *, vocab_multiple: int = VOCAB_MULTIPLE, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Convert an HF folder to a Megatron folder of the layout above, bit by bit in the dtype it has.

    Raises ConversionError if `hf` is incomplete or unsupported, or `out` exists. `out` appears when it is complete.
    """
    hf, out = Path(hf), Path(out)
    shape = read_shape(hf)
    rules = rules_for(shape, vocab_multiple)
    reader = HfReader(hf)
    check_total(rules, hf_names=reader.names())
    _check_copy_of_embedding(reader, rules)
    # What a tied output layer holds is the embedding, stored once.
    stored = {name: rule for name, rule in rules.items() if rule.exports}
    total = sum(reader.nbytes(name) for rule in stored.values() for name in rule.hf_names)
    with new_folder(out) as partial, _progress("HF -> Megatron", total) as (bar, task):

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, rule in stored.items():
                yield name, rule.to_megatron([reader.get(hf_name) for hf_name in rule.hf_names])
                bar.advance(task, sum(reader.nbytes(hf_name) for hf_name in rule.hf_names))

        write_megatron(partial / "model", tensors(), num_layers=shape.num_layers, max_shard_bytes=max_shard_bytes)
        copy_config(hf, partial / "hf")
        write_metadata(partial, model_type=shape.model_type, vocab_multiple=vocab_multiple)


def megatron_to_hf(
    megatron: str | Path, out: str | Path, dtype: torch.dtype | None = None, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Convert a Megatron folder of the layout above (also a training checkpoint) to an HF folder; `dtype` None keeps what is stored.

    Raises ConversionError if `megatron` is incomplete or of another model than its hf/ says, or `out` exists. `out` appears when
    it is complete.
    """
    rules, reader = _open_megatron(Path(megatron))
    stored = {name: rule for name, rule in rules.items() if rule.exports}
    with _progress("Megatron -> HF", sum(reader.nbytes(name) for name in stored)) as (bar, task):

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, rule in stored.items():
                yield from zip(rule.exports, rule.to_hf(reader.get(name)), strict=True)
                bar.advance(task, reader.nbytes(name))

        write_hf(out, tensors(), source=Path(megatron) / "hf", dtype=dtype, max_shard_bytes=max_shard_bytes)


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

    This half needs no model; comparing log-probs is for the packages above.
    """
    rules, reader = _open_megatron(Path(megatron))
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


def write_metadata(folder: Path, *, model_type: str, vocab_multiple: int) -> None:
    """Say what a Megatron folder is, beside its model/ and hf/."""
    content = {"format": FORMAT, "version": 1, "model_type": model_type, "vocab_multiple": vocab_multiple}
    (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open_megatron(folder: Path) -> tuple[dict[str, Rule], MegatronReader]:
    """The rules and the reader of a Megatron folder, checked against each other."""
    if not folder.is_dir():
        raise ConversionError(f"Megatron folder {folder} does not exist")
    if not (folder / "model").is_dir() or not (folder / "hf").is_dir():
        hint = f"; give its parent {folder.parent}" if (folder.parent / "hf").is_dir() else ""
        raise ConversionError(f"{folder} is not a checkpoint folder with model/ (Megatron) and hf/ (config and tokenizer) in it{hint}")
    rules = rules_for(read_shape(folder / "hf"), VOCAB_MULTIPLE)
    reader = MegatronReader(folder / "model")
    check_total(rules, megatron_names=reader.names())
    return rules, reader


def _check_copy_of_embedding(reader: HfReader, rules: Mapping[str, Rule]) -> None:
    """A tied model's folder may repeat the embedding as lm_head.weight, but must not hold something else there."""
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


# ---- command line

app = typer.Typer(help="Convert checkpoints between Hugging Face and Megatron-Core.", no_args_is_help=True)
HfOption = Annotated[Path, typer.Option("--hf", help="Hugging Face folder with config.json and safetensors.")]
MegatronOption = Annotated[Path, typer.Option("--megatron", help="Checkpoint folder with model/ and hf/ in it.")]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to create; must not exist.")]


@contextmanager
def _one_sentence_errors() -> Iterator[None]:
    """The command line's boundary: the user's mistakes and the disk's refusals end as a sentence, ours as a traceback."""
    try:
        yield
    except (ConversionError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command("hf-to-megatron")
def hf_to_megatron_command(hf: HfOption, out: OutOption) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint."""
    with _one_sentence_errors():
        hf_to_megatron(hf, out)
    typer.echo(f"wrote {out}")


@app.command("megatron-to-hf")
def megatron_to_hf_command(
    megatron: MegatronOption,
    out: OutOption,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; as stored if left out.")] = None,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder that transformers and vLLM load."""
    with _one_sentence_errors():
        if dtype is not None and dtype not in DTYPES:
            raise ConversionError(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
        megatron_to_hf(megatron, out, None if dtype is None else DTYPES[dtype])
    typer.echo(f"wrote {out}")


@app.command("verify")
def verify_command(hf: HfOption, megatron: MegatronOption) -> None:
    """Compare a Hugging Face folder with a Megatron checkpoint: names, shapes, dtypes, checksums; fails unless bit-equal."""
    with _one_sentence_errors():
        result = verify(hf, megatron)
    typer.echo(
        f"{result.num_tensors} tensors, {len(result.differences)} differ; worst {result.worst} (difference {result.worst_difference:g})"
    )
    typer.echo(f"sha256 hf {result.hf_sha256}\nsha256 megatron {result.megatron_sha256}")
    for name, difference in result.differences.items():
        typer.echo(f"  {name}: {difference}")
    if result.differences:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
