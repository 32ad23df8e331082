"""Ports for servers that are started later, by number. A port that the system gives away could be someone else's by then."""

import random
import socket
from pathlib import Path

_TAKEN_BY_THE_SYSTEM = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RANDOM = random.Random()  # of its own seed: tests seed the shared one, and two workers must not try the same ports


def free_port(neighbours: int = 0) -> int:
    """A free port of 127.0.0.1, with as many free ones after it, of those that the system gives to nobody."""
    lowest = int(_TAKEN_BY_THE_SYSTEM.read_text().split()[0]) if _TAKEN_BY_THE_SYSTEM.exists() else 32768
    while True:
        first = _RANDOM.randrange(10_000, max(lowest, 20_000) - neighbours)
        if all(_is_free(port) for port in range(first, first + neighbours + 1)):
            return first


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
