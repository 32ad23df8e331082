"""Read any table of records, one at a time: JSON lines, one big JSON list, TSV, parquet; the text formats also as .gz.

file ──by its name and first bytes──> (row, record) or (row, Problem), and how many bytes that took

Memory holds one record (of parquet a batch), however large the file is.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from igpo_megatron.data.json_rows import Flaw, RecordDecoder
from igpo_megatron.data.parquet_rows import python_rows, repeated_fields
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.tsv import read_table

Records = Iterator[tuple[int, dict[str, Any] | Problem]]
"""(row counted from 0, record or what is wrong with it). A Problem without a row ends the file."""

SUFFIXES = (".jsonl", ".json", ".tsv", ".parquet")
PARQUET_ROWS = 256
CHUNK = 2**16
_LIST = re.compile(r"\s*(?:\{\s*\"data\"\s*:\s*)?\[", re.IGNORECASE)
"""A list, or an object whose first value is one under the name `Data`, as in TriviaQA's files."""

_BETWEEN = re.compile(r"[\s,]*")


def read_records(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Records:
    """Every record of a file. `on_bytes` is told of the bytes read since it was last called; in all, the file's size."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        yield 0, Problem("no such file")
    elif suffix not in SUFFIXES or path.name.endswith(".parquet.gz"):
        yield 0, Problem(f"found the name {path.name}; expected one that ends in {', '.join(SUFFIXES)}, the first three also with .gz")
    elif suffix == ".parquet":
        yield from _parquet(path, on_bytes)
    else:
        yield from _text(path, suffix, on_bytes)


def _parquet(path: Path, on_bytes: Callable[[int], None]) -> Records:
    row = 0
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            if repeated := repeated_fields(file.schema_arrow):
                yield 0, Problem("the column is there twice; keep one", column=repeated[0])
                return
            total = file.metadata.num_rows
            for batch in file.iter_batches(PARQUET_ROWS):
                for record in python_rows(batch):
                    yield row, record if isinstance(record, dict) else replace(record, row=row)
                    row += 1
                on_bytes(size * row // total - size * (row - batch.num_rows) // total)
    except (pa.ArrowException, OSError) as error:
        yield row, Problem(f"not a parquet file, or a damaged one ({str(error).splitlines()[0]}); fetch it again")


def _text(path: Path, suffix: str, on_bytes: Callable[[int], None]) -> Records:
    row = told = 0
    with path.open("rb") as raw:
        stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        try:
            for row, record in read_table(stream) if suffix == ".tsv" else _json(stream, suffix):
                yield row, record
                if (now := raw.tell()) != told:
                    on_bytes(now - told)
                    told = now
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield row + 1, Problem(f"the compressed file is cut or damaged ({error}); fetch it again")
        except UnicodeDecodeError as error:
            yield row + 1, Problem(f"not UTF-8 text ({error.reason}); save the file as UTF-8")
        on_bytes(raw.tell() - told)


def _json(stream: Any, suffix: str) -> Records:
    # Only a .json is looked into: it may be either, and a .jsonl's first line may be megabytes long.
    if suffix == ".json" and _LIST.match(stream.peek(CHUNK)[:CHUNK].decode("utf-8-sig", errors="replace")):
        return _list(stream)
    return _lines(stream)


def _lines(stream: IO[bytes]) -> Records:
    row, decoder = 0, RecordDecoder()
    for line in stream:
        if not line.strip():
            continue
        record: Any
        try:
            record = decoder.loads(line)
        except UnicodeDecodeError as error:
            record = Problem(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)", row)
        except json.JSONDecodeError as error:
            record = Problem(f"not JSON ({error.msg} at column {error.colno}): {line[:60].decode(errors='replace').strip()!r}", row)
        except Flaw as flaw:
            record = Problem(str(flaw), row, flaw.column)
        yield row, _object(record, row)
        row += 1


def _list(stream: IO[bytes]) -> Records:
    """The objects of a JSON list, decoded one by one."""
    decoder, characters = RecordDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text = characters.decode(stream.read(CHUNK))
    start = _LIST.match(text)
    assert start is not None, "the caller has looked"
    position, row, size = start.end(), 0, CHUNK
    while True:
        position = _BETWEEN.match(text, position).end()  # type: ignore[union-attr]
        record: Any
        try:
            if text.startswith("]", position):
                return
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos > len(text) - 16
            more = stream.read(size) if cut else b""
            if not more:
                where = text[position : position + 60]
                yield row, Problem(f"not JSON, or cut off, in record {row} ({error.msg}): {where!r}; fetch the file again")
                return
            # Twice as much each time: a long record is not decoded from its start again and again.
            text, position, size = text[position:] + characters.decode(more), 0, 2 * size
            continue
        try:
            decoder.check(record)
        except Flaw as flaw:
            record = Problem(str(flaw), row, flaw.column)
        yield row, _object(record, row)
        row, size = row + 1, CHUNK


def _object(record: Any, row: int) -> dict[str, Any] | Problem:
    if isinstance(record, dict | Problem):
        return record
    return Problem(f"found a JSON {type(record).__name__}, expected an object", row)
