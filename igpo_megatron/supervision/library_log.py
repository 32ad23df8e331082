"""Keep warnings of libraries in the run's folder, so that the console shows only what concerns the run.

runs/NAME/logs/
    rank0.txt    warnings and log records of the libraries that a rank uses
    engines/     what vLLM printed in the processes of the newest start (engines/ray_cluster.py)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from igpo_megatron.supervision.blotting import blot_environment
from igpo_megatron.supervision.failures import appended

LOGS = "logs"
_OURS = ("igpo_megatron", "checkpoint_conversion")


class _Keeper(logging.Handler):
    """Appends the records of libraries to a file. Our records are shown as without a handler, unless our logger has one."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        top = record.name.partition(".")[0]
        if top not in _OURS:
            self.keep(f"{self.format(record)}\n")
        elif not logging.getLogger(top).handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def keep(self, text: str) -> None:
        """If the file is full or cannot be written, nothing is kept: no run ends for this."""
        if self._path is not None:
            appended(self._path, blot_environment(text))


@contextmanager
def libraries_logged(path: Path | None) -> Iterator[None]:
    """Inside, warnings of libraries are appended to `path`, once for each place; warnings of our own files are shown as before.

    A command that writes no folder passes None: then nothing is kept.
    """
    keeper, show = _Keeper(path), warnings.showwarning

    def keep(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if set(Path(filename).parts) & set(_OURS):
            show(message, category, filename, lineno, file, line)
        else:
            keeper.keep(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = keep
    logging.root.addHandler(keeper)
    try:
        yield
    finally:
        logging.root.removeHandler(keeper)
        warnings.showwarning = show
