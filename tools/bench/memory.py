"""The most anonymous memory that a block of code takes: what no file backs, so memory-mapped pages of a checkpoint do not count."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def anonymous_peak(every_s: float = 0.005) -> Iterator[list[int]]:
    """A list whose one element is, after the block, the most bytes above those at its start: RssAnon, read every `every_s`."""
    peak, done, at_start = [0], threading.Event(), anonymous_bytes()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], anonymous_bytes() - at_start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs."""
    return status_bytes("RssAnon")


def status_bytes(field: str) -> int:
    """A number of bytes by its name in /proc/self/status, such as VmRSS, or VmHWM for the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """The highest resident memory begins again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
