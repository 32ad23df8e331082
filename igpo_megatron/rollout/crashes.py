"""Tracebacks of trajectories that raised what nobody expected: one file in the run's folder, bounded, without secrets.

trajectory ──exception──> record ──> its traceback at the end of the file, one sentence for `Trajectory.reason`
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from igpo_megatron.search.backend import Secret, blot
from igpo_megatron.untrusted import clean_text

logger = logging.getLogger(__name__)

MOST_BYTES = 2**20
"""Of the file; later tracebacks are counted, but not kept."""

MOST_CHARS = 16_000
"""Of one traceback: its beginning and its end."""

SENTENCE_CHARS = 300
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Environment variables whose values are shown nowhere."""


class CrashLog:
    """Used from one event loop."""

    def __init__(self, path: Path | None, environment: Mapping[str, str] = os.environ):
        """`path` None keeps no tracebacks."""
        self._path = path
        self._secrets = [Secret(name, value) for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= 8]
        self.count = 0

    def record(self, what: str, error: Exception) -> str:
        """Keep the traceback of `error`, which ended `what`; one sentence about it. Raises nothing, whatever the error holds."""
        trace = self._shown("".join(traceback.format_exception(error)))
        said = self._shown("".join(traceback.format_exception_only(error)))
        if len(trace) > MOST_CHARS:
            trace = f"{trace[: MOST_CHARS // 2]}\n... {len(trace) - MOST_CHARS} characters left out ...\n{trace[-MOST_CHARS // 2 :]}"
        sentence = " ".join(said.split())[:SENTENCE_CHARS]
        if self._kept(f"==== {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {what}\n{trace.rstrip()}\n\n"):
            sentence += f"; its traceback is in {self._path}"
        self.count += 1
        if self.count == 1:
            logger.warning("%s crashed: %s; further crashes are counted as `crashed`", what, sentence)
        return sentence

    def _shown(self, text: str) -> str:
        for secret in self._secrets:
            text = blot(text, secret)
        return clean_text(text)

    def _kept(self, entry: str) -> bool:
        """True if there is a file with the entry in it."""
        if self._path is None:
            return False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                if file.tell() + len(entry) > MOST_BYTES:
                    return False
                file.write(entry)
                return True
        except OSError:
            return False
