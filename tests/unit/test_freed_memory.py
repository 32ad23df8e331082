"""Memory that a process has freed is kept for its next tensors, and goes back to the system if it is much."""

import os
import subprocess
import sys

import pytest

from igpo_megatron.supervision import freed_memory

HOLES = """
import psutil
from igpo_megatron.supervision.freed_memory import give_back_freed_memory
blocks = [bytearray(100_000) for _ in range(4_000)]  # below the size that is mapped by itself
del blocks[:-1]  # the last one holds the end of the heap
process = psutil.Process()
resident = [process.memory_info().rss]
for limits in ({}, {"above": 2**28}):
    give_back_freed_memory(**limits)
    resident.append(process.memory_info().rss)
print(*((before - after) // 2**20 for before, after in zip(resident, resident[1:])))
"""


ANEW = """
import resource, sys
from igpo_megatron.supervision.freed_memory import give_back_freed_memory, keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
bytearray(2**26)  # above what glibc keeps by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(2**26)
cleared = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
give_back_freed_memory(above=2**25)
bytearray(2**26)
print(cleared, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before - cleared)
"""


def pages_cleared(*arguments: str, **environment: str) -> tuple[int, int]:
    """Page faults of four requests of 64 MiB, and of one after freed memory was given back."""
    words, variables = [sys.executable, "-c", ANEW, *arguments], {**os.environ, **environment}
    again, after = subprocess.run(words, env=variables, check=True, capture_output=True, text=True).stdout.split()
    return int(again), int(after)


def test_what_is_kept_is_not_cleared_anew_until_it_is_given_back():
    if freed_memory._glibc() is None:
        pytest.skip("this C library has no mallinfo2 or malloc_trim")
    assert pages_cleared()[0] > 40
    for again, after in (pages_cleared("keep"), pages_cleared(**freed_memory.KEPT)):
        assert again < 10 and after > 10


def test_holes_below_memory_in_use_are_given_back_if_they_are_many():
    if freed_memory._glibc() is None:
        pytest.skip("this C library has no mallinfo2 or malloc_trim")
    printed = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout
    by_default, above_a_quarter = map(int, printed.split())
    assert by_default < 10 and above_a_quarter > 300, "MiB of 381"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    freed_memory.keep_freed_memory()
    freed_memory.give_back_freed_memory()
