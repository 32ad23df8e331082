"""A control group that lets a sandbox have so many processes and threads, where the system lets us make one (Linux, v1 or v2).

The kernel refuses the fork that would be one too many, so no loop outruns the limit. Imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator

_PREFIX = "igpo-python-"
_REMOVE_S = 2.0


class PidsGroup:
    """One control group, of this process at first; what it starts there stays there when the process itself leaves."""

    def __init__(self, folder: str, home: str) -> None:
        self._folder, self._home = folder, home

    @classmethod
    def enter(cls, limit: int) -> PidsGroup:
        """Make a group of at most `limit` processes and threads and move this process into it. Raises OSError where none can be made."""
        reason = OSError("no control group of this process counts processes")
        for parent, home in _parents():
            try:
                _remove_abandoned(parent)
                group = cls(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent), home)
            except OSError as error:
                reason = error
                continue
            try:
                group._write("pids.max", str(limit))
                group._write("cgroup.procs", "0")
                return group
            except OSError as error:
                reason = error
                os.rmdir(group._folder)
        raise reason

    def leave(self) -> None:
        """Move this process back to where it came from."""
        with open(f"{self._home}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")

    def is_overrun(self) -> bool:
        """A process or thread was refused."""
        with open(f"{self._folder}/pids.events", encoding="ascii") as file:
            return int(file.read().split()[1]) > 0

    def kill(self) -> None:
        """Let nothing new begin, and kill whatever is inside."""
        self._write("pids.max", "0")
        with open(f"{self._folder}/cgroup.procs", encoding="ascii") as file:
            for pid in map(int, file.read().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Call it when all that was inside has been waited for."""
        until = time.monotonic() + _REMOVE_S
        while True:
            try:
                return os.rmdir(self._folder)
            except OSError:  # busy: the kernel is still taking the last process out
                if time.monotonic() > until:
                    return None
            time.sleep(0.002)

    def _write(self, name: str, text: str) -> None:
        with open(f"{self._folder}/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _parents() -> Iterator[tuple[str, str]]:
    """(group that may get one of ours, group that this process is in)."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        own = {line.split(":")[1]: line.rstrip("\n").split(":", 2)[2] for line in file}
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = file.read().splitlines()
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup" and "pids" in options.split(","):
            path = next((path for names, path in own.items() if "pids" in names.split(",")), None)
        else:
            path = own.get("") if kind == "cgroup2" else None
        relative = os.path.relpath(path, root) if path else ".."
        if relative.startswith(".."):
            continue
        home = os.path.normpath(f"{point}/{relative}")
        if kind == "cgroup":
            yield home, home
            continue
        # In version 2 a group has limits where its parent hands them down; a group with processes of its own seldom does.
        for parent in [home] if home == point else [home, os.path.dirname(home)]:
            with contextlib.suppress(OSError), open(f"{parent}/cgroup.subtree_control", encoding="ascii") as file:
                if "pids" in file.read().split():
                    yield parent, home


def _remove_abandoned(parent: str) -> None:
    """Empty groups of keepers that were killed."""
    for entry in os.scandir(parent):
        if entry.name.startswith(_PREFIX):
            keeper = entry.name.removeprefix(_PREFIX).split("-")[0]
            if not os.path.exists(f"/proc/{keeper}"):
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)
