"""What nobody expected keeps its traceback: in `failures/` of the run's folder, with one sentence for the console that says where.

runs/NAME/failures/
    rank1.txt       one traceback after the other, each under the time at which it was raised
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

FOLDER = "failures"
_SHOWN_CHARACTERS = 300


def keep_failure(folder: Path | None, name: str, error: BaseException) -> str:
    """Append the traceback of `error` to `folder`/failures/NAME.txt; the sentence that says what was raised and where the traceback is.

    Where the folder is not known (None) or cannot be written, a temporary file takes it, and standard error where that cannot either.
    """
    text = f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {name}\n{''.join(traceback.format_exception(error))}\n"
    path = _append(folder / FOLDER / f"{name}.txt", text) if folder is not None else None
    path = path or _append(Path(tempfile.gettempdir()) / f"igpo-failure-{os.getpid()}.txt", text)
    if path is None:
        sys.stderr.write(text)
    return f"{in_short(error)} (traceback: {path or 'above'})"


def in_short(error: BaseException) -> str:
    """`ValueError: the first line of its message`."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shown = first if len(first) <= _SHOWN_CHARACTERS else f"{first[:_SHOWN_CHARACTERS]} ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _append(path: Path, text: str) -> Path | None:
    """The file that has the text; None where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except (OSError, ValueError):  # a ValueError by a zero byte in the name
        return None
    return path
