"""Read and write Megatron's classic layout: one file per rank, each with its own part of every tensor.

    latest_checkpointed_iteration.txt      "release", or an iteration
    release/ or iter_0000100/
        mp_rank_00_000/model_optim_rng.pt  tensor-parallel rank 0, pipeline stage 0; a third number is the expert-parallel rank
        mp_rank_01_000/model_optim_rng.pt  "model" in it is the rank's state dict: layers and experts numbered from 0 on each rank

Writing holds one rank's part in memory. Reading maps the files and builds none of the other Python objects in them (training arguments
and the like), so that a file can run no code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_conversion.architectures import ModelShape, local_name
from checkpoint_conversion.folders import complete_file
from checkpoint_conversion.rules import ConversionError, Rule
from checkpoint_conversion.torch_file import append_archive, load_mapped
from checkpoint_conversion.units import Reader, Unit

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_SKIPPED = ("_extra_state", "inv_freq")
"""Ends of names in a state dict that are no weights."""


@dataclass(frozen=True)
class Grid:
    """The number of parts into which a model is cut."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def ranks(self) -> list[tuple[int, int, int]]:
        """(tensor, pipeline, expert) rank of each file."""
        return [(t, p, e) for p in range(self.pipeline) for e in range(self.expert) for t in range(self.tensor)]

    def folder_name(self, tensor: int, pipeline: int, expert: int) -> str:
        name = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if self.pipeline > 1 else "")
        return name + (f"_{expert:03d}" if self.expert > 1 else "")


def is_classic(folder: Path) -> bool:
    return any(folder.glob(f"mp_rank_*/{FILE}"))


# ---- writing


def write_classic(
    folder: Path,
    units: Sequence[Unit],
    rules: Mapping[str, Rule],
    shape: ModelShape,
    grid: Grid,
    *,
    te_names: bool = True,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one file per rank; `te_names`: for TransformerEngine's layers, else for Megatron's local ones.

    Files that are there already are those of an interrupted call and are kept: give (a part of) the folder of `new_folder`. The grid
    must divide the model (`check_grid`). `on_bytes` gets the progress, in bytes written.
    """
    for rank in grid.ranks():
        path = folder / "release" / grid.folder_name(*rank) / FILE
        held = list(_held(rank, units, rules, shape, grid, te_names))
        if path.is_file():
            on_bytes(sum(nbytes for *_, nbytes in held))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {}
        for local, rule, unit, nbytes in held:
            (full,) = unit.make()
            state[local] = rule.shard(full, grid.tensor, rank[0]).clone()
            on_bytes(nbytes)
        content = {"model": state, "checkpoint_version": 3.0, "iteration": 0, "args": _arguments(shape, grid, state)}
        with complete_file(path) as file:
            append_archive(file, content)
    with complete_file(folder / TRACKER) as file:
        file.write(b"release")


def total_bytes(units: Sequence[Unit], rules: Mapping[str, Rule], shape: ModelShape, grid: Grid) -> int:
    """Sum of all that `write_classic` reports by `on_bytes`."""
    return sum(nbytes for rank in grid.ranks() for *_, nbytes in _held(rank, units, rules, shape, grid, te_names=False))


def _held(
    rank: tuple[int, int, int], units: Sequence[Unit], rules: Mapping[str, Rule], shape: ModelShape, grid: Grid, te_names: bool
) -> Iterator[tuple[str, Rule, Unit, int]]:
    """(name, rule, unit that makes the full tensor, bytes of the rank's part) of each tensor on a rank."""
    makers = {unit.rule.megatron_name: unit for unit in units}
    for name, rule in rules.items():
        if (local := _name_on(rank, rule, shape, grid, te_names)) is not None:
            unit = makers.get(name) or makers["embedding.word_embeddings.weight"]  # a tied output layer is the embedding
            yield local, rule, unit, unit.nbytes // (grid.tensor if rule.split_dim is not None else 1)


def check_grid(shape: ModelShape, grid: Grid) -> None:
    """Raise ConversionError with every size of the model that the grid does not divide."""
    experts = shape.mixture.num_experts if shape.mixture else 1
    problems = []
    if shape.num_layers % grid.pipeline:
        problems.append(f"pipeline {grid.pipeline} does not divide its {shape.num_layers} layers")
    if shape.num_kv_heads % grid.tensor or shape.num_heads % grid.tensor:
        problems.append(f"tensor {grid.tensor} does not divide its {shape.num_heads} heads and {shape.num_kv_heads} key-value heads")
    if experts % grid.expert:
        problems.append(f"expert {grid.expert} does not divide its {experts if shape.mixture else 'missing'} experts")
    if problems:
        raise ConversionError("this model cannot be cut like this: " + "; ".join(problems))


def _name_on(rank: tuple[int, int, int], rule: Rule, shape: ModelShape, grid: Grid, te_names: bool) -> str | None:
    """Name of a tensor on rank (tensor, pipeline, expert); None if the rank has no part of it."""
    _, pipeline, expert = rank
    name = rule.te_name if te_names else rule.megatron_name
    layer = _LAYER.match(name)
    last = grid.pipeline - 1
    if layer is None:
        at_start = name.startswith("embedding.")
        held = pipeline == (0 if at_start else last) and (bool(rule.exports) or grid.pipeline > 1)
        return name if held else None
    per_stage = shape.num_layers // grid.pipeline
    if int(layer[1]) // per_stage != pipeline:
        return None
    rest = name[layer.end() :]
    if rule.expert is not None:
        assert shape.mixture is not None
        per_rank = shape.mixture.num_experts // grid.expert
        if rule.expert // per_rank != expert:
            return None
        local = str(rule.expert % per_rank)
        rest = re.sub(r"(\.local_experts\.)\d+\.", rf"\g<1>{local}.", rest) if "local_experts" in rest else re.sub(r"\d+$", local, rest)
    return f"decoder.layers.{int(layer[1]) % per_stage}.{rest}"


def _arguments(shape: ModelShape, grid: Grid, state: Mapping[str, Tensor]) -> argparse.Namespace:
    """The training arguments that Megatron compares when it loads, as far as a model determines them."""
    embedding = state.get("embedding.word_embeddings.weight", state.get("output_layer.weight"))
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        padded_vocab_size=None if embedding is None else embedding.shape[0] * grid.tensor,
        untie_embeddings_and_output_weights=not shape.tied,
        num_experts=shape.mixture.num_experts if shape.mixture else None,
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        expert_model_parallel_size=grid.expert,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


# ---- reading


class ClassicReader(Reader):
    """The model's tensors, put together one by one from per-rank files. Names are global local-layer names.

    Any tensor, (virtual) pipeline and expert parallelism, also with uneven stages; experts whole or cut by tensor parallelism.
    Opening reads every file's index: a missing rank, a damaged file or a model of another kind is a ConversionError.
    """

    def __init__(self, folder: str | Path, rules: Mapping[str, Rule], shape: ModelShape) -> None:
        self.folder = Path(folder)
        self._rules, self._shape = rules, shape
        self._parts: dict[str, dict[int, Tensor]] = {}
        paths = [(_RANK.fullmatch(path.parent.name), path) for path in sorted(self.folder.glob(f"mp_rank_*/{FILE}"))]
        files = {(int(rank[1]), int(rank[2] or 0), int(rank[3] or 0)): path for rank, path in paths if rank}
        states = {rank: load_mapped(path) for rank, path in files.items()}
        chunks = {rank: list(_chunks(state, files[rank])) for rank, state in states.items()}
        self.grid, chunks = _grid_of(chunks)
        # Expert ranks may lie along the tensor-parallel ones, so that not every pair of them has a file.
        missing = sorted({(t, p) for t, p, _ in self.grid.ranks()} - {(t, p) for t, p, _ in chunks})
        if missing:
            lacking = ", ".join(f"mp_rank_{tensor:02d}_{pipeline:03d}" for tensor, pipeline in missing)
            raise ConversionError(f"{self.folder} lacks the files of ranks {lacking}; copy the checkpoint again")
        first_layers = _first_layers(chunks)
        for (tensor, pipeline, expert), models in chunks.items():
            for number, model in enumerate(models):
                per_rank = len({match[1] for name in model if (match := _EXPERT.search(local_name(name)))})
                for name, part in model.items():
                    name = local_name(name, first_layers[number, pipeline], expert * per_rank)
                    self._parts.setdefault(name, {}).setdefault(tensor, part)

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._whole(name, lambda part: part.to("meta")).shape)

    def dtype(self, name: str) -> torch.dtype:
        return next(iter(self._parts[name].values())).dtype

    def get(self, name: str) -> Tensor:
        """The full tensor, as at tensor parallel 1 with the vocabulary padded."""
        return self._whole(name, lambda part: part)

    def _whole(self, name: str, take: Callable[[Tensor], Tensor]) -> Tensor:
        rule, parts = self._rules.get(name), self._parts[name]
        first = parts[min(parts)]
        if rule is None or rule.split_dim is None or self._is_whole_expert(rule, first):
            return take(first)
        missing = sorted(set(range(self.grid.tensor)) - set(parts))
        if missing:
            raise ConversionError(f"{name} in {self.folder}: the parts of tensor-parallel ranks {missing} are missing")
        return rule.unshard([take(parts[rank]) for rank in range(self.grid.tensor)])

    def _is_whole_expert(self, rule: Rule, part: Tensor) -> bool:
        if rule.expert is None or self._shape.mixture is None or rule.split_dim is None:
            return False
        return part.shape[rule.split_dim] == self._shape.mixture.ffn_size * len(rule.hf_names)


_Ranks = dict[tuple[int, int, int], list[dict[str, Tensor]]]


def _grid_of(chunks: _Ranks) -> tuple[Grid, _Ranks]:
    """How the files cut the model. With one pipeline stage the second number in a name is the expert rank: then all have the embedding."""
    several = any(pipeline > 0 for _, pipeline, _ in chunks)
    if several and all(any(name.startswith("embedding.") for name in models[0]) for models in chunks.values()):
        chunks = {(tensor, 0, second): models for (tensor, second, _), models in chunks.items()}
    sizes = [max((rank[axis] for rank in chunks), default=0) + 1 for axis in range(3)]
    return Grid(*sizes), chunks


def _first_layers(chunks: _Ranks) -> dict[tuple[int, int], int]:
    """(virtual chunk, pipeline stage) -> the number of its first layer: chunk 0 of all stages, then chunk 1 of all stages, ..."""
    stages = {pipeline: models for (_, pipeline, _), models in sorted(chunks.items(), reverse=True)}
    first, at = {}, 0
    for number in range(max(len(models) for models in stages.values())):
        for pipeline in sorted(stages):
            first[number, pipeline] = at
            at += len({match[1] for name in stages[pipeline][number] if (match := _LAYER.match(name))})
    return first


def _chunks(state: Any, path: Path) -> Iterator[dict[str, Tensor]]:
    """The state dict of the rank, or of each of its virtual pipeline chunks."""
    keys = ["model"] if "model" in state else sorted(key for key in state if re.fullmatch(r"model\d+", str(key)))
    for key in keys:
        model = state[key]
        if not isinstance(model, Mapping) or "language_model" in model:
            raise ConversionError(
                f"{path} holds a model of Megatron-LM before Megatron-Core; convert it with that version's own tools first"
            )
        yield {name: part for name, part in model.items() if not name.endswith(_SKIPPED) and isinstance(part, Tensor)}
    if not keys:
        raise ConversionError(f"{path} holds no model; its keys are {', '.join(map(str, state)) or 'none'}")
