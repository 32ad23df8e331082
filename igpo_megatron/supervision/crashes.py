"""Trajectories that raised what nobody expected: counted, each with its traceback in one file of the run's folder.

trajectory ──exception──> record ──> its traceback at the end of the file, one sentence for `Trajectory.reason`
"""

from __future__ import annotations

import logging
from pathlib import Path

from igpo_megatron.supervision.failures import in_short, kept

logger = logging.getLogger(__name__)


class CrashLog:
    """Used from one event loop."""

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
