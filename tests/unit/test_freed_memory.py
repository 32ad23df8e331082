"""Memory that a process has freed goes back to the system, if it is much."""

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


def test_holes_below_memory_in_use_are_given_back_if_they_are_many():
    if freed_memory._glibc() is None:
        pytest.skip("this C library has no mallinfo2 or malloc_trim")
    printed = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout
    by_default, above_a_quarter = map(int, printed.split())
    assert by_default < 10 and above_a_quarter > 300, "MiB of 381"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    freed_memory.give_back_freed_memory()
