"""Memory that a process has freed goes back to the system."""

import subprocess
import sys

import pytest

from igpo_megatron.supervision import freed_memory

HOLES = """
import psutil, sys
from igpo_megatron.supervision.freed_memory import give_back_freed_memory
blocks = [bytearray(100_000) for _ in range(4_000)]  # below the size that is mapped by itself
del blocks[:-1]  # the last one holds the end of the heap
before = psutil.Process().memory_info().rss
give_back_freed_memory()
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


def test_holes_below_memory_in_use_are_given_back():
    if freed_memory._malloc_trim() is None:
        pytest.skip("this C library has no malloc_trim")
    given_back = int(subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True).stdout)
    assert given_back > 300, "of 381 MiB"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(freed_memory, "_malloc_trim", lambda: None)
    freed_memory.give_back_freed_memory()
