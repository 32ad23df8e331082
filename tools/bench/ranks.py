"""Ranks of a small job on this machine, forked from a process that has imported Megatron once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

LIMIT_S = 600


def on_ranks(size: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks that can meet over gloo. SystemExit with the traceback of one that failed."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    queue: Any = context.Queue()

    def run(rank: int) -> None:
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {**place, "GLOO_SOCKET_IFNAME": "lo"}
        try:
            queue.put((rank, work(), ""))
        except Exception:  # noqa: BLE001  the parent reports whatever it was
            queue.put((rank, None, traceback.format_exc()))

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in ranks:
        process.start()
    try:
        results = {rank: (found, problem) for rank, found, problem in (queue.get(timeout=LIMIT_S) for _ in ranks)}
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    for _, problem in results.values():
        if problem:
            raise SystemExit(problem)
    return [results[rank][0] for rank in range(size)]
