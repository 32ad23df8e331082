"""A control group that limits a sandbox's processes and threads, where the system allows one (Linux cgroups v1 or v2).

The kernel refuses forks beyond the limit, so no loop can outrun it. Imports the standard library only.
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
    """One control group. This process enters it; its children stay inside after it leaves."""

    def __init__(self, folder: str, home: str) -> None:
        self._folder, self._home = folder, home

    @classmethod
    def enter(cls, limit: int) -> PidsGroup:
        """Make a group of at most `limit` processes and threads and move this process into it. Raises OSError if none can be made."""
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
        """Move this process back to its previous group."""
        with open(f"{self._home}/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")

    def is_overrun(self) -> bool:
        """True once a process or thread was refused."""
        with open(f"{self._folder}/pids.events", encoding="ascii") as file:
            return int(file.read().split()[1]) > 0

    def kill(self) -> None:
        """Allow no new process, and kill those inside."""
        self._write("pids.max", "0")
        with open(f"{self._folder}/cgroup.procs", encoding="ascii") as file:
            for pid in map(int, file.read().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self) -> None:
        """Remove the group. Call it after waiting for every process inside."""
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
    """Candidates: (group in which ours could be made, group of this process)."""
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
        # In version 2 a group can set limits only if its parent delegates them; a group that contains processes rarely does.
        for parent in [home] if home == point else [home, os.path.dirname(home)]:
            with contextlib.suppress(OSError), open(f"{parent}/cgroup.subtree_control", encoding="ascii") as file:
                if "pids" in file.read().split():
                    yield parent, home


def _remove_abandoned(parent: str) -> None:
    """Remove the empty groups of keepers that were killed."""
    for entry in os.scandir(parent):
        if entry.name.startswith(_PREFIX):
            keeper = entry.name.removeprefix(_PREFIX).split("-")[0]
            if not os.path.exists(f"/proc/{keeper}"):
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)
