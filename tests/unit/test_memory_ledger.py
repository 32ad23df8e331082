"""Memory per phase, the rank that uses most, and growth that is called a leak."""

from collections.abc import Sequence

import pytest

from igpo_megatron.observability.memory_ledger import MemoryLedger, worst_rank

MIB = 2**20


def ledger_of(mib: Sequence[float], leak_mib: float = 100) -> MemoryLedger:
    """A ledger that has seen one phase end once per step with these many MiB."""
    left = [*mib]
    ledger = MemoryLedger(lambda: int(left.pop(0) * MIB), leak_mib)
    for _ in mib:
        ledger.note("train")
        ledger.step_ended()
    return ledger


def test_a_step_says_what_each_of_its_phases_left_in_use() -> None:
    left = [3 * MIB, 5 * MIB, 4 * MIB]
    ledger = MemoryLedger(lambda: left.pop(0), 100)
    ledger.note("rollout")
    ledger.note("train")
    assert ledger.step_ended() == {"rollout": 3.0, "train": 5.0}
    ledger.note("train")
    assert ledger.step_ended() == {"train": 4.0}


@pytest.mark.parametrize(
    ("mib", "leaks"),
    [
        ([100, 100, 150, 200, 250], 1),
        ([10, 100, 110, 120, 130], 0),  # grows, but by little
        ([100, 100, 300, 299, 400], 0),  # gave something back
        ([100, 100, 150, 250], 0),  # not looked at for long enough
        ([10, 900, 100, 150, 200, 250], 1),  # what was before does not count
        ([100, 100, 250, 250, 250], 0),
        ([10, 150, 200, 250], 0),  # the optimizer's state came after the first time
    ],
)
def test_growth_in_every_one_of_three_steps_is_a_leak(mib: list[float], leaks: int) -> None:
    found = ledger_of(mib).leaks()
    assert len(found) == leaks
    if found:
        assert "after the phase train grew from 100 to 250 MiB in 3 steps that have it, more than placement.leak_mib=100" in found[0]


def test_the_rank_that_uses_most_is_shown() -> None:
    assert worst_rank([{"train": 3.0, "sync": 9.0}, {"train": 5.0}]) == {"memory/train_mib": 5.0, "memory/sync_mib": 9.0}
    assert worst_rank([{}, {}]) == {}
