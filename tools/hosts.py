"""Several "hosts" on one machine: network namespaces joined by a bridge. Processes, memory and files are shared, the network is not.

    host 0 (10.77.0.1) ──veth── bridge ──veth── host 1 (10.77.0.2)       the bridge lies in a namespace of its own,
                                  └──veth── host 2 (10.77.0.3)           so this machine's network is not touched

A namespace lives as long as the process that holds it, and ends with it. Without root a user namespace is tried. On a host the name server
is its own loopback, where none is: questions for names are refused at once, rather than after ten seconds for each connection.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_GATEWAY = "10.77.0.254"
_HOLD = ["sh", "-c", "echo ready; exec sleep infinity"]
_NAME_SERVER = "nameserver 127.0.0.1\n"
_HOLD_HOST = ["sh", "-c", '{ [ ! -e /etc/resolv.conf ] || mount --bind "$0" /etc/resolv.conf; } && echo ready && exec sleep infinity']


class NoHosts(RuntimeError):
    """This machine does not let this user make network namespaces; the message says what failed."""


class Hosts:
    """`count` hosts that reach each other. Use as a context manager. Raises NoHosts where that cannot be."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._holders: list[subprocess.Popen[str]] = []
        self._resolver: Path | None = None

    def __enter__(self) -> Self:
        for tool in ("ip", "unshare", "nsenter"):
            if shutil.which(tool) is None:
                raise NoHosts(f"the command `{tool}` is not installed")
        with tempfile.NamedTemporaryFile("w", prefix="igpo-hosts-", delete=False, encoding="ascii") as file:
            file.write(_NAME_SERVER)
        self._resolver = Path(file.name)
        try:
            self._hold(["unshare", *([] if os.geteuid() == 0 else ["-U", "-r"]), "-n", *_HOLD])
            self._in(0, "ip link add name switch type bridge")
            self._in(0, "ip link set switch up")
            self._in(0, f"ip address add {_GATEWAY}/24 dev switch")
            for number in range(self._count):
                self._hold([*self._enter(0), "unshare", "-n", "-m", *_HOLD_HOST, str(self._resolver)])
                holder = self._holders[-1].pid
                self._in(0, f"ip link add host{number} type veth peer name eth0 netns {holder}")
                self._in(0, f"ip link set host{number} master switch up")
                self._in(number + 1, f"ip address add {self.address(number)}/24 dev eth0")
                self._in(number + 1, "ip link set eth0 up")
                self._in(number + 1, "ip link set lo up")
                # It leads nowhere, but programs learn their own address by asking for a route to the outside.
                self._in(number + 1, f"ip route add default via {_GATEWAY}")
        except NoHosts:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def address(self, number: int) -> str:
        """IP address of a host."""
        return f"10.77.0.{number + 1}"

    def command(self, number: int, command: Sequence[str]) -> list[str]:
        """`command`, run on a host: the process becomes the command itself, so signals reach it."""
        return [*self._enter(number + 1), *command]

    def cut(self, number: int) -> None:
        """Take a host off the network, as if its cable were pulled: nobody is told."""
        self._in(0, f"ip link set host{number} down")

    def join(self, number: int) -> None:
        """Put it back."""
        self._in(0, f"ip link set host{number} up")

    def close(self) -> None:
        """End the namespaces."""
        for holder in self._holders:
            holder.kill()
            holder.communicate()
        self._holders = []
        if self._resolver is not None:
            self._resolver.unlink(missing_ok=True)

    def _enter(self, holder: int) -> list[str]:
        user = [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]
        return ["nsenter", "-t", str(self._holders[holder].pid), *user, "-n", *(["-m", "--wd=."] if holder else [])]

    def _hold(self, command: list[str]) -> None:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline().strip() != "ready":
            raise NoHosts(f"{' '.join(command[:4])}: {holder.stderr.read().strip()}")

    def _in(self, holder: int, command: str) -> None:
        result = subprocess.run([*self._enter(holder), *command.split()], capture_output=True, text=True)
        if result.returncode:
            raise NoHosts(f"{command}: {result.stderr.strip()}")


def available() -> str | None:
    """None where hosts can be made, otherwise why not."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Hosts(1))
        except NoHosts as problem:
            return str(problem)
    return None
