"""Read records one at a time from JSON lines, one JSON list, TSV or parquet; the text formats also as .gz.

file ──by its name and first bytes──> (row, record) or (row, Problem), and the number of bytes read

Memory holds one record (a batch for parquet), however large the file is.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from igpo_megatron.data.json_rows import Records, read_json
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.tsv import read_table

SUFFIXES = (".jsonl", ".json", ".tsv", ".parquet")
PARQUET_ROWS = 256

UNREADABLE = (ValueError, KeyError, OverflowError, pa.ArrowException)
"""What pyarrow raises for values without a Python form: bytes that are not UTF-8, dates out of range, unknown time zones."""

MOST_PROBLEMS = 1000
"""A file with more is not read to its end."""


def read_records(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Records:
    """Every record of a file. `on_bytes` gets the number of bytes read since its last call; these add up to the file's size."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        yield 0, Problem("no such file")
    elif suffix not in SUFFIXES or path.name.endswith(".parquet.gz"):
        yield 0, Problem(f"found the name {path.name}; expected one that ends in {', '.join(SUFFIXES)}, the first three also with .gz")
    elif suffix == ".parquet":
        yield from _parquet(path, on_bytes)
    else:
        yield from _text(path, suffix, on_bytes)


def good_records(path: Path, problems: list[Problem], on_bytes: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The valid records of a file; a Problem in place of a record is added to `problems`, of which there are MOST_PROBLEMS at most."""
    for row, record in read_records(path, on_bytes):
        if len(problems) >= MOST_PROBLEMS:
            problems.append(Problem(f"the rest was not read: already {MOST_PROBLEMS} problems"))
            return
        if isinstance(record, Problem):
            problems.append(record)
        else:
            yield row, record


def _parquet(path: Path, on_bytes: Callable[[int], None]) -> Records:
    row = 0
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            if repeated := repeated_fields(file.schema_arrow):
                yield 0, Problem("the column occurs twice; keep one", column=repeated[0])
                return
            total = file.metadata.num_rows
            for batch in file.iter_batches(PARQUET_ROWS):
                for record in python_rows(batch):
                    yield row, record if isinstance(record, dict) else replace(record, row=row)
                    row += 1
                on_bytes(size * row // total - size * (row - batch.num_rows) // total)
    except (pa.ArrowException, OSError) as error:
        yield row, Problem(f"not a parquet file, or a damaged one ({str(error).splitlines()[0]}); download it again")


def _text(path: Path, suffix: str, on_bytes: Callable[[int], None]) -> Records:
    row = reported = 0
    with path.open("rb") as raw:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        try:
            for row, record in read_table(stream) if suffix == ".tsv" else read_json(stream, may_be_list=suffix == ".json"):
                yield row, record
                if (now := raw.tell()) != reported:
                    on_bytes(now - reported)
                    reported = now
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield row + 1, Problem(f"the compressed file is truncated or damaged ({error}); download it again")
        except UnicodeDecodeError as error:
            yield row + 1, Problem(f"not UTF-8 text ({error.reason}); save the file as UTF-8")
        on_bytes(raw.tell() - reported)


# ---- rows of parquet as plain values


def repeated_fields(schema: pa.Schema) -> list[str]:
    """Dotted names of columns, and of fields inside structs, that occur twice: only one of them could be read."""
    return [*_repeated(list(schema), "")]


def _repeated(fields: list[pa.Field], prefix: str) -> Iterator[str]:
    names = [field.name for field in fields]
    yield from (prefix + name for name in dict.fromkeys(names) if names.count(name) > 1)
    for field in fields:
        yield from _repeated([field.type.field(number) for number in range(field.type.num_fields)], f"{prefix}{field.name}.")


def python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Problem]:
    """Every row as a dict, or a Problem with its column; the caller adds the row's number."""
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
