"""Keep the tracebacks of unexpected errors in `failures/` of the run's folder, bounded and without the environment's secrets.

runs/NAME/failures/
    rank1.txt           of one process: its tracebacks in order, each under the time at which it was raised
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
"""Per file; what would exceed them is not written."""

MOST_CHARS = 16_000
"""Per traceback; of a longer one the beginning and the end are kept."""

SHOWN_CHARS = 300
"""Per error message that a sentence quotes."""


def keep_failure(folder: Path | None, name: str, error: BaseException) -> str:
    """Append the traceback of `error` to `folder`/failures/NAME.txt; return a sentence with the error and where its traceback is.

    Where the folder is unknown (None), or its file is full or cannot be written, the traceback goes to a temporary file, and failing
    that to standard error. Never raises, whatever the error holds.
    """
    entry = _entry(name, error)
    paths = [folder / FOLDER / f"{name}.txt"] if folder is not None else []
    for path in (*paths, Path(tempfile.gettempdir()) / f"igpo-failure-{os.getpid()}.txt"):
        if appended(path, entry):
            return f"{in_short(error)} (traceback: {path})"
    sys.stderr.write(entry)
    return f"{in_short(error)} (traceback: above)"


def appended(path: Path, text: str) -> bool:
    """Append `text` to a file, which may be missing; False if the file would exceed MOST_BYTES or cannot be written."""
    entry = text.encode(errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() + len(entry) > MOST_BYTES:
                return False
            file.write(entry)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return False
    return True


def in_short(error: BaseException) -> str:
    """`ValueError: the first line of its message`."""
    try:
        lines = _shown(str(error)).splitlines()
    except Exception:  # noqa: BLE001  (any class may define __str__)
        lines = []
    first = next((line.strip() for line in lines if line.strip()), "")
    shown = first if len(first) <= SHOWN_CHARS else f"{first[:SHOWN_CHARS]} ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


class CrashLog:
    """Counts trajectories that ended by an unexpected error, and keeps their tracebacks in one file. Used from one event loop."""

    def __init__(self, path: Path | None):
        """`path` None keeps no tracebacks."""
        self._path = path
        self.count = 0

    def record(self, what: str, error: Exception) -> str:
        """Keep the traceback of `error`, which ended `what`; return one sentence about it. Never raises, whatever the error holds."""
        sentence = in_short(error)
        if self._path is not None and appended(self._path, _entry(what, error)):
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
