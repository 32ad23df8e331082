"""Rows in few bytes, to be sent to the ranks that compute them.

    rows ──field by field, one row after the other──> columns ──runs, or the narrowest dtype──> bytes

Most numbers of a row continue the ones before: positions count up, the mask's ends and a trajectory's advantages stay the same. So a column
is stored as runs where that is shorter. Token ids and log-probs are stored as they are.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from igpo_megatron.packing.tree import PackedRow

_NARROW = (torch.int8, torch.int16, torch.int32)


@dataclass(slots=True)
class _Column:
    """One field of all rows."""

    sizes: list[int | None]
    """Its length in every row; None where the row has none."""

    dtype: torch.dtype
    tail: tuple[int, ...]
    """Its shape behind the first dimension."""

    step: int
    """Between neighbours within a run."""

    values: Any
    """numpy; of the runs, or of every element."""

    counts: Any
    """numpy, elements of each run; None where `values` has every element."""


def to_bytes(rows: Sequence[PackedRow]) -> bytes:
    """The rows without `origin`."""
    kept = {field.name: [getattr(row, field.name) for row in rows] for field in fields(PackedRow) if field.name != "origin"}
    return pickle.dumps({name: _column(vs) if any(isinstance(v, torch.Tensor) for v in vs) else vs for name, vs in kept.items()})


def from_bytes(data: bytes) -> list[PackedRow]:
    """The rows that `to_bytes` was given, bit for bit."""
    kept: dict[str, Any] = pickle.loads(data)
    columns = {name: _values(column) if isinstance(column, _Column) else column for name, column in kept.items()}
    return [PackedRow(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _column(values: Sequence[torch.Tensor | None]) -> _Column:
    whole = torch.cat([value for value in values if value is not None])
    # The columns of a matrix one after the other, because numbers continue within a column.
    flat = whole.flatten(1).T.flatten() if whole.dim() > 1 else whole
    bits = (flat.view(torch.int32) if flat.dtype == torch.float32 else flat).long()
    places = torch.arange(len(bits))
    runs = [torch.unique_consecutive(bits - step * places, return_counts=True) for step in (0, 1)]
    step = min((0, 1), key=lambda step: len(runs[step][0]))
    starts, counts = runs[step]
    sizes = [None if value is None else len(value) for value in values]
    shape = (whole.dtype, tuple(whole.shape[1:]))
    if 2 * len(starts) > len(bits):
        return _Column(sizes, *shape, 0, _narrow(bits).numpy(), None)
    return _Column(sizes, *shape, step, _narrow(starts).numpy(), _narrow(counts).numpy())


def _values(column: _Column) -> list[torch.Tensor | None]:
    bits = torch.from_numpy(column.values).long()
    if column.counts is not None:
        bits = bits.repeat_interleave(torch.from_numpy(column.counts).long())
        bits += column.step * torch.arange(len(bits))
    flat = bits.int().view(torch.float32) if column.dtype == torch.float32 else bits.to(column.dtype)
    length = sum(size or 0 for size in column.sizes)
    whole = flat.view(math.prod(column.tail), length).T.reshape(length, *column.tail) if column.tail else flat
    parts = iter(whole.split([size for size in column.sizes if size is not None]))
    return [None if size is None else next(parts) for size in column.sizes]


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    """In the smallest dtype that holds them all."""
    if not len(numbers):
        return numbers
    low, high = int(numbers.min()), int(numbers.max())
    return next((numbers.to(dtype) for dtype in _NARROW if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max), numbers)
