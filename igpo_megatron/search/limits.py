"""Limits on requests to a provider: adaptive concurrency, rate, Retry-After, circuit breaker.

All objects belong to one event loop and know nothing about HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from igpo_megatron.search.results import SearchStatus

ROUND = 20
"""Fewest outcomes by which concurrency is judged; fewer could not tell overload from chance."""


class AdaptiveLimit:
    """Requests in flight: additive increase, multiplicative decrease (Chiu and Jain 1989), judged by rounds.

    A round has as many outcomes as the limit, at least ROUND. If more than a tenth were overloaded (rate-limited or timed out), the limit
    is halved; if fewer than a twentieth, it rises by one. TCP's rule, to halve at every sign, would let one stray timeout in a hundred hold
    it below 15.
    """

    def __init__(self, most: int):
        """`most`: the initial and largest limit."""
        self.most = most
        self.limit = float(most)
        self.running = 0
        self._round = 0
        self._outcomes = 0
        self._overloads = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """A place for one request, first come first served; yields the number of its round."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            # Cancelled just as it was admitted: the slot goes to the next.
            if turn.done() and not turn.cancelled():
                self._release()
            raise
        try:
            yield self._round
        finally:
            self._release()

    def done(self, round_: int, *, overloaded: bool) -> None:
        """Count the outcome of a request of that round. Requests sent before the last change of the limit are ignored."""
        if round_ != self._round:
            return
        self._outcomes += 1
        self._overloads += overloaded
        if self._outcomes < max(ROUND, self.limit):
            return
        share = self._overloads / self._outcomes
        if share > 1 / 10:
            self.limit = max(1.0, self.limit / 2)
            self._round += 1
        elif share < 1 / 20:
            self.limit = min(float(self.most), self.limit + 1)
        self._outcomes = self._overloads = 0

    def _admit(self) -> None:
        while self._waiting and self.running < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _release(self) -> None:
        self.running -= 1
        self._admit()


class Blocked(Exception):
    """No request may leave before a search's deadline."""

    def __init__(self, status: SearchStatus, reason: str):
        super().__init__(reason)
        self.status = status


class Gate:
    """Decides when a request may be sent. One that cannot be sent before its deadline is refused at once."""

    def __init__(self, rate_per_s: float | None, breaker_failures: int, breaker_pause_s: float):
        self._interval_s = 1 / rate_per_s if rate_per_s else 0.0
        self._breaker_failures = breaker_failures
        self._breaker_pause_s = breaker_pause_s
        self._next_start = 0.0
        self._silent_until = 0.0
        """Nothing is sent before this time, at the provider's request."""

        self._failures = 0
        self._last_failure = SearchStatus.ERROR
        self._open_until: float | None = None
        """While not None the breaker is open: nothing is sent before this time, and then a single request."""

        self._closed = asyncio.Event()

    async def enter(self, deadline: float) -> None:
        """Wait until a request may be sent. Raises Blocked if the wait would pass `deadline` (event loop's clock)."""
        now = asyncio.get_running_loop().time
        while True:
            if self._silent_until > now():
                _within(deadline, self._silent_until, SearchStatus.RATE_LIMITED, "the provider asked for a pause")
                await asyncio.sleep(self._silent_until - now())
            elif self._open_until is not None and self._open_until > now():
                _within(deadline, self._open_until, self._last_failure, f"{self._failures} requests in a row had failed")
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._open_until):
                        await self._closed.wait()
            else:
                break
        if self._open_until is not None:
            # This request tests whether the provider is back; the others wait for its answer.
            self._open_until = now() + self._breaker_pause_s
        start = max(now(), self._next_start)
        _within(deadline, start, SearchStatus.TIMEOUT, "too many searches wait for search.rate_per_s")
        self._next_start = start + self._interval_s
        await asyncio.sleep(start - now())

    def answered(self) -> None:
        """The provider responded, with whatever status: close the breaker."""
        self._failures = 0
        self._open_until = None
        self._closed.set()

    def failed(self, status: SearchStatus) -> None:
        """The provider did not respond properly; open the breaker after too many in a row."""
        self._failures += 1
        self._last_failure = status
        if self._failures >= self._breaker_failures:
            self._open_until = asyncio.get_running_loop().time() + self._breaker_pause_s
            self._closed.clear()

    def pause(self, seconds: float) -> None:
        """Send nothing for so long, at the provider's request."""
        self._silent_until = max(self._silent_until, asyncio.get_running_loop().time() + seconds)


def _within(deadline: float, start: float, status: SearchStatus, reason: str) -> None:
    if start > deadline:
        wait_s = start - asyncio.get_running_loop().time()
        raise Blocked(status, f"{reason}; the next request may leave in {wait_s:.0f} s, after search.deadline_s")
