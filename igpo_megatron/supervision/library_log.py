"""What libraries warn of is kept in the run's folder; the console shows what concerns the run.

runs/NAME/logs/
    rank0.txt    warnings and log records of the libraries that a rank uses
    engines/     what vLLM printed in the processes of the newest start (engines/ray_cluster.py)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from igpo_megatron.supervision.blotting import blot_environment

LOGS = "logs"
MOST_BYTES = 2**20
"""Of a file; it takes nothing beyond them."""

_OURS = ("igpo_megatron", "checkpoint_conversion")


class _Keeper(logging.Handler):
    """Appends to a file what libraries say. Ours is shown as if no handler were there, unless it has one of its own."""

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
        """Where the file is full or cannot be written, nothing is kept: no run ends for this."""
        if self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                if file.tell() + len(text) < MOST_BYTES:
                    file.write(blot_environment(text))


@contextmanager
def libraries_logged(path: Path | None) -> Iterator[None]:
    """Inside, what libraries warn of is appended to `path`, once for each place; what our files warn of is shown as before.

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
