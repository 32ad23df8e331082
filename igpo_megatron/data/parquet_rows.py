"""Rows of parquet as plain values, and what no row could be read without knowing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from igpo_megatron.data.problems import Problem

UNREADABLE = (ValueError, KeyError, OverflowError, pa.ArrowException)
"""What pyarrow raises for a value that is no Python value: bytes that are not UTF-8, a date beyond the calendar, an unknown time zone."""


def repeated_fields(schema: pa.Schema) -> list[str]:
    """Dotted names of columns, and of fields inside structs, that are there twice: only one of them could be read."""
    return [*_repeated(list(schema), "")]


def _repeated(fields: list[pa.Field], prefix: str) -> Iterator[str]:
    names = [field.name for field in fields]
    yield from (prefix + name for name in dict.fromkeys(names) if names.count(name) > 1)
    for field in fields:
        yield from _repeated([field.type.field(number) for number in range(field.type.num_fields)], f"{prefix}{field.name}.")


def python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Problem]:
    """Every row as a dict, or the Problem that names its column; the row's number is the caller's to say."""
    try:
        yield from batch.to_pylist()
        return
    except UNREADABLE:
        pass  # found below, value by value
    for number in range(batch.num_rows):
        yield _python_row(batch, number)


def _python_row(batch: pa.RecordBatch, number: int) -> dict[str, Any] | Problem:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except UNREADABLE as error:
            return Problem(f"the value cannot be read ({str(error).splitlines()[0]})", column=name)
    return row
