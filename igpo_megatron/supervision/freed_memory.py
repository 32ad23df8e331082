"""Give back to the system what a process has freed."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back_freed_memory() -> None:
    """Return freed memory that glibc keeps for later to the system; does nothing with another C library.

    Tensors of ever other lengths leave holes that the next ones do not fit: ranks that train 135 M parameters on CPU would grow by 0.5 GB
    with every step, from 4 GB to 9. It takes 0.2 s then, and next to nothing where little was freed.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
