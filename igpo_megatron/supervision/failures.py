"""What nobody expected keeps its traceback: in `failures/` of the run's folder, bounded and without the secrets of the environment.

runs/NAME/failures/
    rank1.txt           of a process; one traceback after the other, each under the time at which it was raised
    trajectories.txt    of trajectories that ended as `crashed`
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path

from igpo_megatron.supervision.blotting import blot_environment
from igpo_megatron.untrusted import clean_text

logger = logging.getLogger(__name__)

FOLDER = "failures"

MOST_BYTES = 2**20
"""Of a file; it takes no traceback beyond them."""

MOST_CHARS = 16_000
"""Of one traceback: its beginning and its end."""

SHOWN_CHARS = 300
"""Of a message in a sentence."""


def keep_failure(folder: Path | None, name: str, error: BaseException) -> str:
    """Append the traceback of `error` to `folder`/failures/NAME.txt; the sentence that says what was raised and where the traceback is.

    Where the folder is not known (None), or its file is full or cannot be written, a temporary file takes it, and standard error where
    that cannot either. Raises nothing, whatever the error holds.
    """
    path = folder / FOLDER / f"{name}.txt" if folder is not None else None
    if path is None or not kept(path, name, error):
        path = Path(tempfile.gettempdir()) / f"igpo-failure-{os.getpid()}.txt"
        if not kept(path, name, error):
            path = None
            sys.stderr.write(_entry(name, error))
    return f"{in_short(error)} (traceback: {path or 'above'})"


def kept(path: Path, what: str, error: BaseException) -> bool:
    """Append the traceback of `error`, which ended `what`, to a file; False where that is full or cannot be written."""
    entry = _entry(what, error).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() + len(entry) > MOST_BYTES:
                return False
            file.write(entry)
    except (OSError, ValueError):  # a ValueError by a zero byte in the name
        return False
    return True


def in_short(error: BaseException) -> str:
    """`ValueError: the first line of its message`."""
    try:
        lines = _shown(str(error)).splitlines()
    except Exception:  # noqa: BLE001  (a __str__ of anybody's)
        lines = []
    first = next((line.strip() for line in lines if line.strip()), "")
    shown = first if len(first) <= SHOWN_CHARS else f"{first[:SHOWN_CHARS]} ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


class CrashLog:
    """Trajectories that raised what nobody expected: counted, each with its traceback in one file. Used from one event loop."""

    def __init__(self, path: Path | None):
        """`path` None keeps no tracebacks."""
        self._path = path
        self.count = 0

    def record(self, what: str, error: Exception) -> str:
        """Keep the traceback of `error`, which ended `what`; one sentence about it. Raises nothing, whatever the error holds."""
        sentence = in_short(error)
        if self._path is not None and kept(self._path, what, error):
            sentence += f"; its traceback is in {self._path}"
        self.count += 1
        if self.count == 1:
            logger.warning("%s crashed: %s; further crashes are counted as `crashed`", what, sentence)
        return sentence


def _entry(what: str, error: BaseException) -> str:
    trace = _shown("".join(traceback.format_exception(error)))
    if len(trace) > MOST_CHARS:
        trace = f"{trace[: MOST_CHARS // 2]}\n... {len(trace) - MOST_CHARS} characters left out ...\n{trace[-MOST_CHARS // 2 :]}"
    return f"==== {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {what}\n{trace.rstrip()}\n\n"


def _shown(text: str) -> str:
    return clean_text(blot_environment(text))
