"""An event loop whose time stands still while the machine does, for tests with timeouts of a server and its clients on one loop.

A stall of seconds is no timeout for them, so short timeouts and close bounds do. Not for what threads or processes do.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Waits(selectors.DefaultSelector):
    """Adds up the waits in which nothing arrived."""

    waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(timeout)
        if timeout and not found:
            self.waited_s += timeout
        return found


class PatientLoop(asyncio.SelectorEventLoop):
    """Its time passes only in waits in which nothing arrives, by what was to be waited."""

    def __init__(self) -> None:
        self._waits = _Waits()
        super().__init__(self._waits)

    def time(self) -> float:
        return self._waits.waited_s


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Like `asyncio.run`."""
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        return runner.run(work)


def now() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()
