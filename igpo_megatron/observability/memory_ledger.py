"""Memory in use after each phase of a step, and a warning when it grows from step to step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

LEAK_STEPS = 3
"""Growth is judged over this many steps that have the phase."""

_MIB = 2**20


class MemoryLedger:
    """Bytes in use at the end of every phase of this rank."""

    def __init__(self, read: Callable[[], int], leak_mib: float) -> None:
        """`read`: bytes in use. More than `leak_mib` of growth over `LEAK_STEPS` successive times after one phase is a leak.

        The first time does not count: the optimizer's state and other things that are made once are not there before the first step.
        """
        self._read, self._leak_mib = read, leak_mib
        self._now: dict[str, float] = {}
        self._earlier: dict[str, deque[float]] = {}

    def note(self, phase: str) -> None:
        """Record the memory in use when a phase has ended."""
        self._now[phase] = self._read() / _MIB

    def step_ended(self) -> dict[str, float]:
        """Phase -> MiB in use at its end in this step."""
        now, self._now = self._now, {}
        for phase, mib in now.items():
            if phase in self._earlier:
                self._earlier[phase].append(mib)
            else:
                self._earlier[phase] = deque(maxlen=LEAK_STEPS + 1)
        return now

    def leaks(self) -> list[str]:
        """One sentence for every phase whose memory grew each of the last times, and by more than allowed in total."""
        found = []
        for phase, seen in self._earlier.items():
            grows = len(seen) > LEAK_STEPS and all(before < after for before, after in zip(seen, list(seen)[1:], strict=False))
            if grows and seen[-1] - seen[0] > self._leak_mib:
                found.append(
                    f"memory in use after the phase {phase} grew from {seen[0]:,.0f} to {seen[-1]:,.0f} MiB in {LEAK_STEPS} steps "
                    f"that have it, more than placement.leak_mib={self._leak_mib:g}: something is not released"
                )
        return found


def worst_rank(ledgers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`memory/PHASE_mib` of the rank that uses the most."""
    phases = dict.fromkeys(phase for ledger in ledgers for phase in ledger)
    return {f"memory/{phase}_mib": max(ledger[phase] for ledger in ledgers if phase in ledger) for phase in phases}
