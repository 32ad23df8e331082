"""Describe a folder for users: one line per fact, problems last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint_conversion.architectures import ModelShape, check_sizes, check_total, read_shape, rules_for
from checkpoint_conversion.classic_folder import ClassicReader, is_classic
from checkpoint_conversion.convert import VOCAB_MULTIPLE, find_weights
from checkpoint_conversion.gguf_to_hf import inspect_gguf
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import ConversionError
from checkpoint_conversion.torch_dist_folder import MegatronReader
from checkpoint_conversion.units import Reader


def inspect(folder: Path, list_tensors: bool = False) -> Iterator[str]:
    """Lines about the folder, or a GGUF file. What is incomplete or unsupported is described as far as it can be read, with the reason.

    Raises ConversionError if it is no model at all.
    """
    if folder.is_file():
        yield from inspect_gguf(folder, list_tensors)
        return
    if not folder.is_dir():
        raise ConversionError(f"{folder} does not exist")
    weights = find_weights(folder)
    if (folder / "job.json").is_file():
        yield "kind: unfinished conversion; the command that began it resumes it"
        finished = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".safetensors", ".distcp", ".pt"))
        yield from (f"finished: {path.relative_to(folder)}" for path in finished)
    elif weights is not None:
        config = folder / "hf"
        shape = read_shape(config) if config.is_dir() else None
        yield from _megatron(weights, shape, list_tensors)
        yield from _run_state(folder)
    elif (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        yield from _hf(folder, list_tensors)
    elif files := sorted(folder.glob("*.gguf")):
        for file in files:
            yield from inspect_gguf(file, list_tensors)
    else:
        raise ConversionError(
            f"{folder} is neither a Hugging Face folder (config.json) nor a Megatron checkpoint (model/, .metadata, mp_rank_*), "
            "and holds no .gguf file"
        )


def _hf(folder: Path, list_tensors: bool) -> Iterator[str]:
    yield "kind: Hugging Face"
    shape = None
    try:
        shape = read_shape(folder)
        yield from _model(shape)
    except ConversionError as error:
        yield f"problem: {error}"
    parts = {"tokenizer": "tokenizer*", "chat template": "*chat_template*", "generation config": "generation_config.json"}
    for what, pattern in parts.items():
        yield f"{what}: {', '.join(sorted(path.name for path in folder.glob(pattern))) or 'none'}"
    try:
        reader = HfReader(folder)
        yield f"files: {len(reader.paths())}"
        yield from _tensors(reader, list_tensors)
        if shape is not None:
            rules = rules_for(shape, VOCAB_MULTIPLE)
            check_total(rules, hf_names=reader.names())
            check_sizes(rules, shape, {name: reader.shape(name) for name in reader.names()})
            yield "complete: every tensor is there, and a rule claims it"
    except ConversionError as error:
        yield f"problem: {error}"


def _megatron(weights: Path, shape: ModelShape | None, list_tensors: bool) -> Iterator[str]:
    classic = is_classic(weights)
    yield f"kind: Megatron-Core, {'classic (one file per rank)' if classic else 'torch_dist (loads at any parallel layout)'}"
    rules = rules_for(shape, VOCAB_MULTIPLE) if shape is not None else {}
    if shape is not None:
        yield from _model(shape)
    elif classic:
        yield "problem: no hf/config.json beside it, without which the ranks' parts cannot be put together"
        return
    try:
        reader: Reader
        if shape is not None and classic:
            reader = ClassicReader(weights, rules, shape)
            yield f"ranks: tensor {reader.grid.tensor}, pipeline {reader.grid.pipeline}, expert {reader.grid.expert}"
        else:
            reader = MegatronReader(weights)
            others = Counter(key.split(".")[0] for key in reader.other_keys())
            yield f"beside the model: {', '.join(sorted(others)) or 'nothing'}"
        yield from _tensors(reader, list_tensors)
        if shape is not None:
            check_total(rules, megatron_names=reader.names())
            yield "complete: every tensor is there, and a rule claims it"
    except ConversionError as error:
        yield f"problem: {error}"


def _run_state(folder: Path) -> Iterator[str]:
    path = folder / "state.json"
    if path.is_file():
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            yield f"training run: step {state.get('step')}, optimizer steps {state.get('optimizer_steps')}, layout {state.get('layout')}"
        except (ValueError, AttributeError) as error:
            yield f"problem: {path} is damaged ({error})"


def _model(shape: ModelShape) -> Iterator[str]:
    yield f"model: {shape.model_type}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}"
    yield f"attention: {shape.num_heads} heads, {shape.num_kv_heads} key-value heads of {shape.head_dim}"
    if shape.mixture is not None:
        yield f"experts: {shape.mixture.num_experts} of {shape.mixture.ffn_size}, {shape.mixture.top_k} per token"
    yield f"output layer: {'the embedding (tied)' if shape.tied else 'its own'}"
    yield f"dtype in config: {shape.dtype or 'not given'}"


def _tensors(reader: Reader, list_tensors: bool) -> Iterator[str]:
    sizes: Counter[torch.dtype] = Counter()
    for name in reader.names():
        sizes[reader.dtype(name)] += torch.Size(reader.shape(name)).numel()
    nbytes = sum(count * dtype.itemsize for dtype, count in sizes.items())
    kinds = ", ".join(f"{count / 1e9:.3f} B in {str(dtype).removeprefix('torch.')}" for dtype, count in sizes.most_common())
    yield f"tensors: {len(reader.names())}, {kinds}, {nbytes / 1e9:.2f} GB"
    if list_tensors:
        for name in reader.names():
            yield f"  {name} {str(reader.dtype(name)).removeprefix('torch.')} {list(reader.shape(name))}"
