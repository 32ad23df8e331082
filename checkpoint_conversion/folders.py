"""Folders that appear when they are complete: written beside their place, resumed after an interruption, renamed at the end.

.NAME.partial/      what is finished so far, with a description of the job; one process at a time
    |  every file in it is written as *.tmp and renamed when it is on the disk
    v
NAME/               exists only when it is complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from checkpoint_conversion.rules import ConversionError

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_JOB = "job.json"
_LOCK = ".lock"


def partial_of(folder: Path) -> Path:
    """Where `folder` is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def new_folder(folder: Path, job: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well.

    `job` (JSON-able) describes source and result. A block that was interrupted, or stopped by the disk, is resumed by one with the
    same job, which finds the finished files; another job starts from nothing. Raises ConversionError if `folder` exists, if another
    process writes it, or if the disk refuses. A ConversionError of the block itself leaves nothing behind.
    """
    partial = partial_of(folder)
    try:
        if folder.exists():
            raise ConversionError(f"{folder} exists already; choose another folder or remove it")
        partial.mkdir(parents=True, exist_ok=True)
        opened = (partial / _LOCK).open("w")
    except OSError as error:
        raise ConversionError(
            f"{folder} cannot be made ({error.strerror}: {error.filename}); choose a folder that you may write"
        ) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another process is writing {folder} (in {partial}); wait for it, or end it") from None
        try:
            _begin(partial, json.dumps(job, sort_keys=True, indent=2))
            yield partial
            for path in (partial / _JOB, partial / _LOCK):
                path.unlink()
            sync(partial)
            partial.rename(folder)
            sync_one(folder.parent)
        except ConversionError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            raise ConversionError(
                f"{folder} could not be written: {error}. What is finished is kept in {partial}: "
                "free space or repair the disk and give the same command to go on, or remove that folder"
            ) from error


def _begin(partial: Path, job: str) -> None:
    """Empty the folder unless it holds the beginning of the same job."""
    path = partial / _JOB
    if not path.is_file() or path.read_text(encoding="utf-8") != job:
        for entry in partial.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with complete_file(path) as file:
            file.write(job.encode())
    for leftover in partial.rglob("*.tmp"):
        leftover.unlink()


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name only when it is completely on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(folder: Path) -> None:
    """Flush everything in `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """A job's source, so that it is not resumed with another one: path, and size and time of each file."""
    stats = {str(path.relative_to(folder)): path.stat() for path in sorted(files)}
    return {"folder": str(folder.resolve()), "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def copy_config(source: Path, target: Path) -> None:
    """Copy the other files of a model unchanged: config, generation config, tokenizer, chat templates, licence."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        is_weight = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weight and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name, dirs_exist_ok=True)
