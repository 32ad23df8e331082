"""Attempts for `head_kernel.unfit`, by the standard library alone: a process of its own has them at once."""

import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection


def as_named(connection: Connection, names: Sequence[str]) -> None:
    """Does what each name says."""
    connection.send(None)
    for name in names:
        if name == "hangs":
            time.sleep(60)
        if name == "crashes":
            os._exit(3)
        problem = "it failed" if name == "fails" else None
        connection.send(problem)
        if problem:
            return


def not_at_all(connection: Connection, names: Sequence[str]) -> None:
    """Ends before it is ready."""
