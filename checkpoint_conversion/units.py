"""Conversions in pieces that fit in memory: the tensors to make, known before the first is read, and how to make each.

Names, dtypes and shapes come from running the rules on tensors without data ("meta"), so that every mismatch between a config and
its weights is an error before anything is written, and files can be laid out, and resumed, shard by shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from checkpoint_conversion import MAX_SHARD_BYTES as MAX_SHARD_BYTES  # writers import it from here
from checkpoint_conversion.rules import Rule


@dataclass(frozen=True)
class TensorInfo:
    """Description of a tensor before it exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Unit:
    """Tensors that one rule makes together."""

    rule: Rule
    tensors: tuple[TensorInfo, ...]
    make: Callable[[], Sequence[Tensor]]
    """The tensors, in that order."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Reader(Protocol):
    """The tensors of a folder, one by one."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> Tensor: ...

    def nbytes(self, name: str) -> int:
        return TensorInfo(name, self.dtype(name), self.shape(name)).nbytes


def to_megatron(rules: Mapping[str, Rule], hf: Reader) -> list[Unit]:
    """One unit for each tensor that a Megatron checkpoint stores; a tied output layer is the embedding, stored once."""
    units = []
    for name, rule in rules.items():
        if rule.exports:
            full = rule.to_megatron([_meta(hf, hf_name) for hf_name in rule.hf_names])
            units.append(Unit(rule, (_info(name, full),), partial(_full, rule, hf)))
    return units


def to_hf(rules: Mapping[str, Rule], megatron: Reader) -> list[Unit]:
    """One unit for the HF tensors of each Megatron tensor."""
    units = []
    for name, rule in rules.items():
        if rule.exports:
            parts = rule.to_hf(_meta(megatron, name))
            infos = tuple(_info(hf_name, part) for hf_name, part in zip(rule.exports, parts, strict=True))
            units.append(Unit(rule, infos, partial(_parts, rule, megatron)))
    return units


def shards(units: Iterable[Unit], max_bytes: int) -> list[list[Unit]]:
    """Units in files of at most `max_bytes`; a larger unit has a file of its own."""
    files: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not files or size + unit.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(unit)
        size += unit.nbytes
    return files


def _full(rule: Rule, hf: Reader) -> list[Tensor]:
    return [rule.to_megatron([hf.get(name) for name in rule.hf_names])]


def _parts(rule: Rule, megatron: Reader) -> list[Tensor]:
    return rule.to_hf(megatron.get(rule.megatron_name))


def _meta(reader: Reader, name: str) -> Tensor:
    return torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta")


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape))
