"""Remove what killed processes left behind, and nothing that is still in use.

In shared memory and in the temporary folder a file lock shows that the owner is alive. Other files and folders are first written under
a temporary name (`whole`), so they are either complete or absent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_YOUNG_S = 2.0
"""Younger paths are kept: their owner may not have claimed them yet."""


def claim(path: Path) -> int:
    """Lock a file or folder until the returned descriptor is closed, at the latest when this process ends, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def claimed(make: Callable[[], Path]) -> tuple[Path, int]:
    """The file or folder that `make` makes, with its claim; made anew where another process has removed it as abandoned before."""
    while True:
        path = make()
        with suppress(FileNotFoundError):
            descriptor = claim(path)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove this user's files and folders named `prefix`* in `folder` that no living process has claimed."""
    for path in folder.glob(f"{prefix}*"):
        try:
            status = path.stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG_S:
                continue
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # another process was faster
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder under; it becomes `path` when the block ends, and is removed if the block fails.

    Of processes that write the same `path` at once, each has its own; the last one to end stays. A file never replaces a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f"{path.name}.{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(name)}*.part"):
        pid = left.name.removeprefix(name).partition(".")[0]
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            _remove(left)
    part = path.with_name(f"{name}{os.getpid()}.part")
    try:
        yield part
        _rename(part, path, aside=part.with_suffix(".old.part"))
    finally:
        _remove(part)


def _rename(part: Path, path: Path, aside: Path) -> None:
    """A folder at `path` is moved aside first: nobody sees it half removed."""
    while True:
        try:
            part.replace(path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _remove(aside)  # another process has written `path` since this one moved it
        with suppress(FileNotFoundError):  # another process was faster
            path.replace(aside)
    _remove(aside)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):  # another process was faster
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the thread that started it ends, however it ends. On Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
